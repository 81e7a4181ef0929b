"""Names of classes."""
import re


def folded(name: str) -> str:
    """`Traffic_Light` and `traffic light` as one word: a name without what people spell differently."""
    return re.sub(r"[\s_-]+", "", name.casefold())
