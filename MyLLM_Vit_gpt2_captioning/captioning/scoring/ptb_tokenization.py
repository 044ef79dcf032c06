"""Penn Treebank tokenization of captions in Python: the same tokens as the COCO caption evaluation gets from Java.

The reference is Stanford's PTBTokenizer 3.4.1 as pycocoevalcap runs it (-preserveLines -lowerCase, then punctuation
removed). It is a lexer, with its rules in PTBLexer.flex of Stanford CoreNLP: at each position the rule with the longest
match wins, where the match includes the required following text; among equally long ones the first rule wins. This
module works in the same way. The reference's quirks are kept, because published scores have them:

- Brackets stay, as "-lrb-" and so on: punctuation is compared with upper-case names after the text was lowercased.
- "!!", "?!" and dashes of five or more hyphens stay; only "!", "?", "-" and "--" are removed.
- All captions are one text, a line each, so the next caption can change the end of one: "plan b." becomes "plan b"
  where the next line starts with "A " or "The ", elsewhere it stays "plan b."; and some rules need a character after
  the token, which the last caption does not have.

Known differences: letters added after Unicode 6.0, which the reference drops, and the lower case of a Greek capital
sigma that is followed by digits and then letters in one word.
"""

import re
from itertools import groupby

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def tokenize(captions):
    """captions: list of str -> list of str, the lowercased tokens of each joined by spaces, without punctuation.

    Equal to pycocoevalcap's `PTBTokenizer` for one list of captions. Line breaks in a caption count as spaces; the
    reference assigns captions to the wrong images after a line break other than a newline. Where a token contains a
    space ("1 1/2", a telephone number), it is a no-break space, as in the reference.
    """
    text = "\n".join(caption.translate(_LINE_BREAKS) for caption in captions)
    lines, tokens, position = [], [], 0
    while position < len(text):
        plain = _PLAIN.match(text, position)
        if plain:
            word, period = plain[1].lower(), plain[2]
            if word not in (_IRREGULAR_BEFORE_PERIOD if period else _IRREGULAR):
                tokens.append(word)
                position = plain.end()
                continue
        if text[position] == "\n":
            lines.append(_without_punctuation(tokens))
            tokens = []
            position += 1
        elif text[position] == " ":
            position = _SPACES.match(text, position).end()
        else:
            token, position = _longest_match(text, position)
            tokens.append(token)
    lines.append(_without_punctuation(tokens))
    return lines[: len(captions)]  # without captions the text still has one, empty, line


def _without_punctuation(tokens):
    line = " ".join(token for token in tokens if token).rstrip()
    return " ".join(token for token in line.split(" ") if token not in PUNCTUATION)


def _longest_match(text, position):
    """-> (the token at `position`, "" for a character that belongs to no token; the position after it)."""
    best, best_write, best_end = None, None, position
    for pattern, write in _RULES:
        match = pattern.match(text, position)
        if match and match.end() > best_end:
            best, best_write, best_end = match, write, match.end()
    if best is None:
        return "", position + 1
    return best_write(best[1]).lower(), best.end(1)


# --- characters and words ---------------------------------------------------------------------------------------------


def _any_case(words):
    """A pattern for any of the words, which are separated by spaces, in whatever case."""
    longest_first = sorted(words.split(), key=len, reverse=True)
    return "(?ai:" + "|".join(map(re.escape, longest_first)) + ")"


def _capitalized(words):
    """Like `_any_case`, but the first letter must be a capital: in lower case these are common words."""
    return "(?:" + "|".join(f"{word[0]}(?ai:{word[1:]})" for word in words.split()) + ")"


def _class_of(belongs):
    """The inside of a character class with all characters of the basic plane for which the predicate `belongs` is
    true, as ranges."""
    runs = groupby(map(chr, range(0x10000)), belongs)
    runs = [list(characters) for belonging, characters in runs if belonging]
    return "".join(f"{re.escape(run[0])}-{re.escape(run[-1])}" for run in runs)


_LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\u2028\u2029"), " ")
SPACE = r" \t\u00a0\u2000-\u200a\u3000"
GAP = rf"[{SPACE}\n\x85]"  # a space or the end of a line
# Letters. Those added after Unicode 6.0 count here, while the reference drops them; two of 6.0 are no longer letters.
ALPHA = _class_of(str.isalpha) + r"\u1885\u1886"
# Characters that continue a word like a letter: the soft hyphen, combining accents, vowel signs.
SIGNS = (
    r"\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384\u0385\u03f6\u0483-\u0487"
    r"\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4"
    r"\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e"
    r"\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3\u0a01-\u0a03"
    r"\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03"
    r"\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
# All other characters that are tokens by themselves; characters neither here nor in a rule are dropped.
SYMBOLS = (
    r"%&+=/\\^|~\u00a1\u00a6-\u00a9\u00ac\u00ae-\u00b1\u00b2-\u00ba\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0"
    r"\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d"
    r"\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f"
    r"\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
ENTITY_LETTER = r"&[aeiouAEIOU](?ai:acute|grave|uml);"
LETTER = rf"(?:[{ALPHA}{SIGNS}]|{ENTITY_LETTER})"
WORD_PART = rf"{LETTER}(?:{LETTER}|\d)*"
WORD = rf"{WORD_PART}(?:[.!?]{WORD_PART})*"  # "sun.The" is one word
APOSTROPHE = r"(?:['\x92\u2019]|&(?ai:apos);)"
ANY_APOSTROPHE = rf"(?:{APOSTROPHE}|[`\x91\u2018\u201b])"
HYPHEN = r"[-_\u058a\u2010\u2011]"
INNER_PUNCTUATION = r"[,;:\u3001]"
CLITIC = rf"{APOSTROPHE}(?:[msdMSD]|(?ai:re|ve|ll))"  # the 's of "it's"
NOT = rf"(?ai:n){ANY_APOSTROPHE}(?ai:t)"  # the n't of "don't"
NUMBER = r"(?:\d+(?:[.:,\u00ad\u066b\u066c]\d+)*|(?:[.:,\u00ad\u066b\u066c]\d+)+)"
SLASH = r"(?:\\?/|\u2044)"
MARKUP = (
    r"<(?:[!?][A-Za-z\-][^>\r\n]*|[A-Za-z][\w:.\-]*"
    r"(?: +[A-Za-z][\w:.\-]*(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */?|/[A-Za-z][\w:.\-]*) *>"
).replace(r"\w", "A-Za-z0-9_")

# Abbreviations keep their period. Months, days, states, companies, titles; those that are common words need a capital.
ABBREVIATIONS = (
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri "
    "Ala Ariz Calif Colo Conn Ct Dak Fla Ga Ind Kan Kans Ky Md Mich Minn Mo Mont Neb Nev Okla Penn Tenn Va Vt Wis Wisc "
    "Wyo Inc Co Cos Corp Ltd Plc Rt Bancorp Bhd Assn Univ Intl Sys tel est ext sq Jr Sr Bros Ed.D Ph.D Blvd Rd Esq etc "
    "al seq Bldg"
)
CAPITALIZED_ABBREVIATIONS = "Az Ark Del Ill La Mass Miss Ore Pa Tex Wash"
TITLES = (
    "Mr Mrs Ms Dr Drs Prof Profs Sen Sens Rep Reps Atty Attys Lt Col Gen Messrs Gov Govs Adm Rev Maj Sgt Cpl Pvt Capt "
    "St Ste Ave Pres Lieut Hon Brig Cmdr Comdr Pfc Spc Supt Supts Det Mt Ft Adj Adv Asst Assoc Ens Insp Mlle Mme Msgr "
    "Sfc vs Alex Wm Jos Cie a.k.a cf TREAS Ph Invt Elec Natl Dept"
)
BEFORE_NUMBERS = "ca fig figs prop no nos art bldg pp op"  # abbreviations only before a number: "no. 5"
COUNTRY_ACRONYM = r"(?:(?ai:Canada|Sino|Korean|EU|Japan|non)-(?ai:U\.S)|(?ai:U\.S\.-U\.S\.S\.R|U\.S\.-U\.K))"
LONG_ACRONYM = rf"(?:{COUNTRY_ACRONYM}|[A-Za-z](?:\.[A-Za-z])+)"
ACRONYM = rf"(?:{COUNTRY_ACRONYM}|[A-Za-z](?:\.[A-Za-z])*)"
ABBREVIATION = rf"(?:{_any_case(ABBREVIATIONS)}|{_capitalized(CAPITALIZED_ABBREVIATIONS)}|[Pp]{{1,2}}[Tt][ye][Ss]?)"
TITLE = rf"(?:{_any_case(TITLES)}|{_capitalized('Miss')}|[Mm][ft][Gg]|{ACRONYM})"
# Capitalised words that start a sentence: a single letter and a period before them end the previous one.
SENTENCE_STARTS = _capitalized(
    "About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Mr\\. Ms\\. "
    "Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You"
)
ASSIMILATIONS = {"cannot": 3, "gonna": 2, "gotta": 2, "lemme": 2, "gimme": 2, "wanna": 2}  # length of the second word
FILE_ENDINGS = (
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql "
    "tar txt wav x xml zip"
)
IN_URL = r"[^ \t\n\f\r\"<>|(){}]"
IN_HOST = r"[^ \t\n\f\r\"<>|.!?(){},]"
IN_NAMED_HOST = r"[^ \t\n\f\r\"`'<>|.!?(){},-_$]"  # ",-_" is a range in the reference too: no digits, no capitals
IN_PATH = r"[^ \t\n\f\r\"<>|()]"
URL_END = r"[^ \t\n\f\r\"<>|.!?(){},\-]"
IN_EMAIL = r"[^ \t\n\f\r\"<>|(){}.\u00a0]"


# --- how a token is written -------------------------------------------------------------------------------------------


def _as_it_is(token):
    return token


def _without_soft_hyphens(token):
    return token.replace("\u00ad", "") or "-"


def _with_ampersand(token):
    return re.sub("(?ai:&amp;)", "&", token)


def _unbroken(token):
    return token.replace(" ", "\u00a0")


def _without_parentheses(token):
    return token.replace("(", "-LRB-").replace(")", "-RRB-")


def _telephone(token):
    return _without_parentheses(_unbroken(token))


_CURRENCIES = str.maketrans({"\u00a2": "cents", "\u00a3": "#", **dict.fromkeys("\x80\u00a4\u20a0\u20ac", "$")})
_FRACTIONS = str.maketrans({"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"})
_QUOTES = str.maketrans(
    {
        '"': "''",
        **dict.fromkeys("\x91\u2018\u201b\u2039", "`"),
        **dict.fromkeys("\x92\u2019\u203a", "'"),
        **dict.fromkeys("\x93\u201c\u00ab", "``"),
        **dict.fromkeys("\x94\u201d\u00bb", "''"),
    }
)


def _quotes(token):
    return token.replace("&apos;", "'").replace("&quot;", "''").translate(_QUOTES)


def _always(text):
    return lambda token: text


# --- the rules --------------------------------------------------------------------------------------------------------


def _rule(token, write=_as_it_is, followed_by=""):
    """-> (pattern, function from the matched token to its written form).

    `followed_by` is the pattern of the text that must follow the token; it counts for the longest match.
    """
    return re.compile(f"({token}){followed_by}"), write


_RULES = [
    _rule(r"(?ai:c\+\+|[cf]#)"),
    # Two words written as one: can+not, gon+na, 't+is.
    *(
        _rule(f"(?ai:{word[:-second]})", followed_by=f"(?ai:{word[-second:]})")
        for word, second in {**ASSIMILATIONS, "'twas": 3, "'tis": 2}.items()
    ),
    _rule(MARKUP, _unbroken),
    _rule(r"&(?ai:md|mdash|ndash);|[\x96\x97\u2013-\u2015]", _always("--")),
    _rule(r"&(?ai:amp);", _with_ampersand),
    _rule(r"&(?:(?ai:ht|tl|ur|lr|qc|ql|qr|odq|cdq)|#[0-9]+);"),
    # Words; "it's" is it+'s, "don't" is do+n't.
    _rule(WORD, _without_soft_hyphens, followed_by=CLITIC),
    _rule(r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", _without_soft_hyphens, followed_by=NOT),
    _rule(WORD, _without_soft_hyphens),
    # Words with an apostrophe that stay whole: 'n', l'amour, 'em, O'Hara, '90s, 'til, ma'am, ...
    _rule(rf"{APOSTROPHE}(?ai:n){APOSTROPHE}?|[lLdDjJ]{APOSTROPHE}|(?ai:dunkin|somethin|ol){APOSTROPHE}"),
    _rule(rf"{APOSTROPHE}(?:(?ai:em|till|til|cause)|[2-9]0(?ai:s))|[A-HJ-XZn]{ANY_APOSTROPHE}[{ALPHA}]{{2,}}"),
    _rule(rf"[{ALPHA}]+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z][{ALPHA}]*|(?ai:o){ANY_APOSTROPHE}(?ai:o)"),
    _rule(r"(?ai:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)"),
    _rule(rf"(?ai:y){APOSTROPHE}", followed_by=f"[{ALPHA}]"),  # y'+all
    # Addresses.
    _rule(rf"(?ai:https?)://{IN_URL}+{URL_END}"),
    *(
        _rule(host + path)
        for repeat, path in (("+", ""), ("+?", rf"/{IN_PATH}+{URL_END}"))
        for host in (
            rf"(?ai:www)\.(?:{IN_HOST}+\.){repeat}[a-zA-Z]{{2,4}}",
            rf"(?:{IN_NAMED_HOST}+\.){repeat}(?ai:com|net|org|edu)",
        )
    ),
    _rule(
        rf"(?:(?ai:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{{}}]*@(?:{IN_EMAIL}+\.)*{IN_EMAIL}+(?:(?ai:&gt;)|>)?"
    ),
    _rule(rf"@[a-zA-Z_][a-zA-Z_0-9]*|\#{LETTER}+"),
    _rule(f"{CLITIC}|{NOT}", _quotes, followed_by="[^A-Za-z]"),
    # Numbers, dates, fractions. Currencies are written as the treebank writes them: pounds are "#".
    _rule(r"\d{1,2}[\-/]\d{1,2}[\-/]\d{2,4}"),
    _rule(rf"[\-+]?{NUMBER}", _without_soft_hyphens),
    _rule(r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _rule(rf"(?:\d{{1,4}}[\- \u00a0])?\d{{1,4}}{SLASH}\d{{1,4}}", _unbroken),
    _rule(r"[\u00bc-\u00be\u2153-\u215e]", lambda token: token.translate(_FRACTIONS)),
    # Treebank words with hyphen, ampersand or apostrophe; words joined by slashes.
    _rule(r"-(?ai:rrb|lrb|rcb|lcb|rsb|lsb)-|(?ai:c\.d\.s|pro-|anti-)", _with_ampersand),
    _rule(
        rf"(?ai:s(?:&|&amp;)(?:p-500|ls))|(?ai:cap){APOSTROPHE}(?ai:n)|(?ai:c){APOSTROPHE}(?ai:est)", _with_ampersand
    ),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule(r"[A-Z]*\$|\#"),
    _rule(
        r"[\u00a2-\u00a5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]",
        lambda token: token.translate(_CURRENCIES),
    ),
    # Abbreviations. A single letter loses its period where a sentence starts after it.
    _rule(
        rf"{ACRONYM}\.",
        lambda token: token[0] if len(token) == 2 else token,
        followed_by=rf"{GAP}+(?:{SENTENCE_STARTS}|{MARKUP}){GAP}",
    ),
    _rule(rf"{_any_case(BEFORE_NUMBERS)}\.", followed_by=rf"{GAP}?\d"),
    _rule(r"(?:(?ai:pt)[eyEY]|(?ai:co))\.", followed_by=rf"[{SPACE}](?ai:ltd|lim)"),
    _rule(rf"{ABBREVIATION}\.", followed_by=r"(?:[\s\S]{2})?"),
    _rule(rf"{TITLE}\."),
    _rule(TITLE, followed_by=f"[{SPACE}]"),
    _rule(ACRONYM, followed_by=GAP),
    _rule(rf"{APOSTROPHE}[0-9][0-9]", followed_by=GAP),
    _rule(rf"(?:{LETTER}|\d)+(?:\.(?:{LETTER}|\d)+)*\.{_any_case(FILE_ENDINGS)}", followed_by=rf"(?:{GAP}|[.?!,])"),
    _rule(rf"{WORD}\.", _without_soft_hyphens, followed_by=INNER_PUNCTUATION),
    _rule(
        r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[\- \u00a0])?[0-9]{2,4}[\- \u00a0])"
        r"[0-9]{3,4}[\- \u00a0]?[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        _telephone,
    ),
    # Punctuation and symbols.
    _rule(r'"|&(?ai:quot);', _quotes, followed_by="(?:[A-Za-z0-9$])?"),
    _rule(r"<|&(?ai:lt);", _always("<")),
    _rule(r">|&(?ai:gt);", _always(">")),
    _rule(r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]", _without_parentheses, followed_by="[^A-Za-z0-9]"),
    _rule(r"[\-^x=~<>']_[\-^x=~<>']|\([\-^x=~<>'][_.]?[\-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", _without_parentheses),
    *(
        _rule(re.escape(bracket), _always(name))
        for bracket, name in zip("(){}[]", ("-LRB-", "-RRB-", "-LCB-", "-RCB-", "-LSB-", "-RSB-"), strict=True)
    ),
    _rule("-+", lambda token: "--" if len(token) in (3, 4) else token),
    _rule(r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\x85\u2026]", _always("...")),
    _rule(r"@+|\#+|_+|\*+|(?:\\\*){1,3}|[?!]+"),
    _rule(rf"{INNER_PUNCTUATION}|\."),
    # Words and numbers joined by hyphens or ampersands, with inner periods and commas: 3.5-inch, mid-U.S., AT&T.
    _rule(
        rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{LONG_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+\.",
        _without_soft_hyphens,
        followed_by=INNER_PUNCTUATION,
    ),
    _rule(rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{LONG_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+", _without_soft_hyphens),
    *(
        _rule(token + end, write, followed_by)
        for token, write in (
            (
                rf"(?:[dDoOlL]{ANY_APOSTROPHE}[{ALPHA}\d])?[{ALPHA}\d]+"
                rf"(?:{HYPHEN}(?:[dDoOlL]{ANY_APOSTROPHE}[{ALPHA}\d])?[{ALPHA}\d]+)*",
                _as_it_is,
            ),
            (r"[A-Z]+(?:(?:&(?ai:amp);|[+&])[A-Z]+)+", _with_ampersand),
        )
        for end, followed_by in ((r"\.", INNER_PUNCTUATION), ("", ""))
    ),
    # Quotes.
    _rule("'", _always("`"), followed_by=r"[A-Za-z][^ \t\n\r\u00a0]"),
    _rule(f"{CLITIC}|{NOT}", _quotes),
    _rule(rf"''|[`\x91-\x94\u2018-\u201f\u2039\u203a\u00ab\u00bb]{{1,2}}|{APOSTROPHE}", _quotes),
    _rule("<<|>>"),
    _rule(f"[{SYMBOLS}]"),
    _rule(rf"[{SPACE}]+|&(?ai:nbsp);", _always("")),
]

# Most of a caption is plain words. These are matched without trying every rule, together with a following comma or
# period, unless a rule above treats them differently.
_PLAIN = re.compile(r"([A-Za-z]+)(?:,|(\.))?(?=[ \n])")
_SPACES = re.compile(f"[{SPACE}]+")
_IRREGULAR = frozenset(ASSIMILATIONS)
_IRREGULAR_BEFORE_PERIOD = frozenset(
    (
        *"abcdefghijklmnopqrstuvwxyz",
        *["pte", "ptes", "pty", "ptys", "ppte", "pptes", "ppty", "pptys", "mfg", "mtg"],
        *f"{ABBREVIATIONS} {CAPITALIZED_ABBREVIATIONS} {TITLES} {BEFORE_NUMBERS}".lower().split(),
        *ASSIMILATIONS,
    )
)
