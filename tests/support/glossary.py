"""Words of the private dialect that this project has left, with the words of the field that replace them."""

import re

# The "not" column of the glossary: pages and source avoid these words.
GLOSSARY = {
    r"foretells?|foretold|forecasts?": "estimate, predicted",
    r"shar(?:es|ing) by segments": "vector quantization of segments",
    r"turn(?:ed|s)? round|l(?:ies|ie|ying) the other way": "transposed",
    r"standing": "existing output",
    r"leftovers?": "redundant tensor",
    r"amend(?:s|ed|ment|ing)?": "atomic edit",
    r"slots?": "parameter lookup",
    r"made again": "recomputed",
    r"done without": "stops, is replaced",
    r"goes away|go away|went away": "worker is lost",
    # Not a moment in time, nor the keys and flags of formats that stay.
    r"(?<!second )(?<!second_)(?<!the same )(?<!['\"])moments?(?![_-](?:gib|sha256))": "Hessian, second moment",
    r"energy|energies": "weighted error",
    r"joined(?! by | late)|laid": "fused",  # but texts are joined by separators, and nodes join a cluster
    r"artifacts?": "stored model",
    r"order of pieces": "row permutation",
    r"tells?|told|says?|said": "raises, returns, states",
    r"apart": "separate",
    r"lies|lie|lay|lying": "is, is stored",
}

# Turns of phrase that only the source had.
DIALECT = {
    r"make[s]? again|made anew|makes? anew|anew": "recomputed, again",
    r"does without": "stops, is replaced",
    r"becomes?|became": "is converted to, load_weights",
    r"seen as": "viewed as",
    r"deals? out|dealt|deals?": "distributes",
    r"held against": "compared with",
    r"whole again": "restored",
    r"has its say|have their say": "decides",
    r"for want of": "because X is missing",
    r"in spite of": "despite",
    r"that which": "the one that",
    r"what it is of": "the name of the thing",
    r"wants?|wanted": "needs, expected",
    r"gives? away": "reveals",
    r"takes? for": "treats as",
    r"goes? on|went on|going on": "resumes, continues",
    r"comes? up": "starts",
}


def pattern_of(*tables: dict[str, str]) -> re.Pattern[str]:
    """A pattern that finds the words of the tables; an underscore ends a word, as in identifiers."""
    words = [expression for table in tables for expression in table]
    return re.compile("|".join(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])" for word in words), re.IGNORECASE)
