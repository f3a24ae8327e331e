"""Names in the place of a token job."""

DONE, REJECTS = "_done/", "_rejects/"
REQUEST = "request.json"
