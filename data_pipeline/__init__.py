"""From raw pairs to batches: pack, manifests, order, streams and the token job."""
