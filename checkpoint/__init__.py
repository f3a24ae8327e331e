"""The logical checkpoint: global names and slices, readable by any mesh; no pickles."""
