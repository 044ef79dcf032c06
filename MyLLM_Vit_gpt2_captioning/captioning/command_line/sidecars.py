"""Captions in files beside their photos: a.txt for a.jpg, a caption a line, or a.xmp, with the first as dc:description.

captions.csv is the record of what was written. A sidecar is written behind its line there, whole or not at all; when
that was interrupted, the next command writes it from the line. A file that holds something else than the lines of its
photo was not written here: what happens to it is for `existing` to say.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from captioning.common.files import write_atomically
from captioning.data.conventions import IMAGE_SUFFIXES

EXISTING = ("skip", "overwrite", "append", "prepend")
XMP = ".xmp"
NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
}
X, RDF, DC = (f"{{{uri}}}" for uri in NAMESPACES.values())
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


class Sidecars:
    """The sidecars with one ending (".txt", ".xmp") of the photos of a command.

    `prepend` and `append`: text in front of each caption and behind it; `existing`: one of EXISTING, for a sidecar
    that was not written here. `written` and `foreign` are the numbers of those written by `write`, and of those that
    `existing` "skip" left alone.
    """

    def __init__(self, ending, existing="skip", prepend="", append=""):
        self.ending = ending if ending.startswith(".") else f".{ending}"
        if self.ending.lower() in (*IMAGE_SUFFIXES, ".", ".csv") or any(c in self.ending for c in "/\\\0"):
            raise ValueError(f"--caption_extension {ending}: captions need an ending of their own, such as .txt")
        if any(len(text.splitlines()) > 1 or text.endswith("\n") for text in (prepend, append)):
            raise ValueError("--prepend and --append are for one line: each line of a sidecar is a caption")
        self.existing, self.prepend, self.append = existing, prepend, append
        self.written = self.foreign = 0
        self.read, self.save = (_read_xmp, _write_xmp) if self.ending.lower() == XMP else (_read_text, _write_text)

    def path(self, photo):
        return Path(photo).with_suffix(self.ending)

    def check(self, photos):
        """Raise ValueError when two of the photos (paths) would have the same sidecar."""
        owners, pairs = {}, []
        for photo in photos:
            first = owners.setdefault(self.path(photo), photo)
            pairs += [(first, photo)] * (first != photo)
        if pairs:
            more = f", and {len(pairs) - 1:,} more" if len(pairs) > 1 else ""
            raise ValueError(
                f"{pairs[0][0]} and {pairs[0][1]} would have the same sidecar, {self.path(pairs[0][0]).name}{more}: "
                "rename one of the two, or caption them without sidecars; nothing was written"
            )

    def is_wanted(self, photo):
        """Whether a photo without a line in the record needs captions for its sidecar."""
        return self.existing != "skip" or not self.path(photo).exists()

    def write(self, photo, record):
        """Write the sidecar of a photo, unless it holds the captions already. `record`: its captions as they are in the
        lines of the table, a list for each line, the newest last. Raises OSError that names the file, and ValueError
        for one that is to be changed and is no XMP file."""
        path, lines = self.path(photo), [self._framed(captions) for captions in record]
        new, old = lines[-1], {line for earlier in lines[:-1] for line in earlier}
        try:
            there = self.read(path) if path.exists() else None
        except ValueError:
            if self.existing != "skip":
                raise
            there = []  # somebody else's, whatever it is
        if there is None or there == new:
            kept = []
        elif there in lines:  # of this photo, by an earlier captioner
            there, kept = None, []
        elif self.existing == "skip":
            self.foreign += 1
            return
        else:
            kept = [line for line in there if line not in old and line not in new]
        if self.existing == "append":
            new = kept + new
        elif self.existing == "prepend":
            new = new + kept
        if there != new:
            self.save(path, new)
            self.written += 1

    def _framed(self, captions):
        framed = [self.prepend + caption + self.append for caption in captions]
        return framed[:1] if self.ending.lower() == XMP else framed


def _read_text(path):
    """The lines of a sidecar; those of a file in another encoding with surrogates in them."""
    return path.read_bytes().decode("utf-8", "surrogateescape").splitlines()


def _write_text(path, lines):
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    write_atomically(path, lambda draft: draft.write_bytes(content))


def _read_xmp(path):
    """The lines of dc:description in an XMP packet. Raises ValueError that names a file which is none."""
    item = _description(_parse_xmp(path), make=False)
    return [] if item is None else (item.text or "").splitlines()


def _write_xmp(path, lines):
    """Set dc:description; the other content of the packet stays."""
    if path.exists():
        packet = _parse_xmp(path)
    else:
        packet = ET.Element(f"{X}xmpmeta")
        ET.SubElement(ET.SubElement(packet, f"{RDF}RDF"), f"{RDF}Description", {f"{RDF}about": ""})
    _description(packet, make=True).text = "\n".join(lines)
    write_atomically(path, lambda draft: ET.ElementTree(packet).write(draft, "utf-8", xml_declaration=True))


def _parse_xmp(path):
    try:
        with open(path, "rb") as file:
            for _, (prefix, uri) in ET.iterparse(file, ["start-ns"]):
                if not re.fullmatch(r"ns\d+|", prefix):  # ElementTree keeps ns0, ns1, ... for itself
                    ET.register_namespace(prefix, uri)
        packet = ET.parse(path).getroot()
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not an XMP file ({error}); move it away, or leave out --write_xmp") from error
    if packet.find(f".//{RDF}Description") is None:
        raise ValueError(f"{path}: not an XMP file (no rdf:Description); move it away, or leave out --write_xmp")
    return packet


def _description(packet, make):
    """The element with the text of dc:description in the default language. Where there is none, it is made if `make`,
    else None is returned."""
    element = packet.find(f".//{RDF}Description[{DC}description]")
    element = packet.find(f".//{RDF}Description") if element is None else element
    for tag, attributes in ((f"{DC}description", {}), (f"{RDF}Alt", {}), (f"{RDF}li", {LANGUAGE: "x-default"})):
        inner = element.find(tag + "".join(f"[@{name}='{value}']" for name, value in attributes.items()))
        if inner is None and not make:
            return None
        element = ET.SubElement(element, tag, attributes) if inner is None else inner
    return element


for prefix, uri in NAMESPACES.items():
    ET.register_namespace(prefix, uri)
