"""Where raw image-caption pairs come from; each source yields `Pair`s."""
