"""Names in the place of a token job."""

SPLITS = ("train", "validation")
DONE, REJECTS = "_done/", "_rejects/"
REQUEST = "request.json"
