"""Places of data, as text; whoever only checks them needs no client of an object store."""

S3 = "s3://"


def place_problems(place: str, setting: str = "") -> list[str]:
    """What is wrong with `s3://bucket/prefix` or a folder, named by its setting if it has one.

    Nothing is looked up.
    """
    said = f"{setting}={place!r}" if setting else repr(place)
    if place.startswith(S3) and not place.removeprefix(S3).partition("/")[0]:
        return [f"{said} names no bucket; write s3://bucket/prefix"]
    if not place.startswith(S3) and ("://" in place or place.startswith("pipe:")):
        return [f"{said} is no store that Tapir reads; give s3://bucket/prefix or a folder"]
    return []
