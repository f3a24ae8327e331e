"""The ground floor: errors, keys, the object store, files and logs; imports no torch."""
