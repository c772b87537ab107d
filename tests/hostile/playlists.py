"""Files that are instructions to open something else: a URL on loopback, or a local file."""

from collections.abc import Iterator

from tests.hostile.mutants import originals

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n"
TEXTS = {
    "hls": HLS,
    "hls with a map": '#EXTM3U\n#EXT-X-MAP:URI="{target}"\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n',
    "hls with a key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:1,\n{target}\n',
    "hls variants": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
    "concat": "ffconcat version 1.0\nfile '{target}'\n",
    "concat without its head": "file '{target}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles='
    '"urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "smooth streaming": '<SmoothStreamingMedia><StreamIndex Url="{target}"/></SmoothStreamingMedia>',
    "svg": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    '<image xlink:href="{target}" width="9" height="9"/></svg>',
    "svg with an entity": '<!DOCTYPE svg [<!ENTITY x SYSTEM "{target}">]><svg>&x;</svg>',
    "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({target}) run\n",
    "postscript": "%!PS\n({target}) (r) file 99 string readstring pop =\n",
    "pdf": "%PDF-1.4\n1 0 obj<</Type/Action/S/URI/URI({target})>>endobj\n",
    "mvg": "push graphic-context\nimage over 0,0 0,0 '{target}'\npop graphic-context\n",
    "msl": '<?xml version="1.0"?><image><read filename="{target}"/></image>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=control:{target}\n",
    "asx": '<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
    "pls": "[playlist]\nFile1={target}\nNumberOfEntries=1\n",
    "ram": "{target}\n",
    "avisynth": 'AviSource("{target}")\n',
    "subtitles": "1\n00:00:00,000 --> 00:00:01,000\n{target}\n",
    "webvtt": "WEBVTT\n\n00:00.000 --> 00:01.000\n{target}\n",
    "image sequence": "{target}%03d.png",
    "url": "[InternetShortcut]\nURL={target}\n",
    "xspf": "<playlist><trackList><track><location>{target}</location></track></trackList></playlist>",
}


def hostile_files(url: str, path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes; each text for a URL and for a local file, then media with such texts in them."""
    for name, text in TEXTS.items():
        for kind, target in (("url", url), ("file", path)):
            yield f"{name}, {kind}", text.format(target=target).encode()
    for name in ("mp4", "webm", "avi", "ts"):
        yield f"hls behind a {name}", originals()[name][:400] + HLS.format(target=url).encode()
    yield "hls before an mp4", HLS.format(target=url).encode() + originals()["mp4"]
    yield "mp4 whose data lies elsewhere", referring_mp4(path)
    yield "matroska that begins as dash", b"\x1a\x45\xdf\xa3" + TEXTS["dash"].format(target=url).encode()
    yield "ogg that begins as hls", b"OggS" + HLS.format(target=url).encode()
    yield "flv that begins as hls", b"FLV\x01" + HLS.format(target=url).encode()
    yield "png with a link as text", originals()["png"] + url.encode()


def referring_mp4(path: str) -> bytes:
    """An mp4 whose data reference names another file."""
    data = originals()["mp4"]
    at = data.index(b"url \x00\x00\x00\x01")
    return data[: at + 4] + b"\x00\x00\x00\x00" + path.encode()[:4].ljust(4, b"\0") + data[at + 12 :]
