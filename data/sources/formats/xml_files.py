"""Reads XML such that every element knows its line, safely."""
import xml.etree.ElementTree as ElementTree
from xml.parsers import expat

LINE = " line"  # an attribute that no document can have


def parse_xml(text: str) -> ElementTree.Element:
    """The root element of a document. Its declared encoding is not looked at: the text is decoded already.

    Raises ValueError if it is not XML, or declares a document type: its entities could expand bytes to gigabytes.
    """
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = lambda tag, attributes: builder.start(
        tag, attributes | {LINE: str(parser.CurrentLineNumber)})
    parser.EndElementHandler, parser.CharacterDataHandler = builder.end, builder.data
    parser.StartDoctypeDeclHandler = _refuse
    try:
        parser.Parse(text.encode("utf-8", "replace"), True)
    except expat.ExpatError as error:
        raise ValueError(str(error)) from None
    return builder.close()


def _refuse(*declared: object) -> None:
    raise ValueError("it declares a document type, which annotations do not need")
