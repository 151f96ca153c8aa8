"""Tokenizers: video to latents and back.

Every one is an nn.Module with the methods of mimo.tokenizers.protocols.

`dct` and `lapped` are computed, the others read weights and are frozen. `weights.checksum` tells two of a kind apart:
latents and checkpoints remember it, and are refused where it is another one.
"""

from __future__ import annotations

from pathlib import Path

from mimo.errors import InputError
from mimo.tokenizers.dct import DCTTokenizer
from mimo.tokenizers.lapped import LappedTokenizer
from mimo.tokenizers.protocols import Tokenizer, VariationalTokenizer

COMPUTED = {"dct": DCTTokenizer, "lapped": LappedTokenizer}
TOKENIZERS = (*COMPUTED, "dcae", "videovae")

__all__ = ["TOKENIZERS", "DCTTokenizer", "LappedTokenizer", "Tokenizer", "VariationalTokenizer", "build_tokenizer"]


def build_tokenizer(
    name: str = "dct",
    *,
    compression: tuple[int, int, int] = (1, 8, 8),
    channels: int | None = None,
    weights: str | Path | None = None,
    trust_pickle: bool = False,
) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        compression: video frames, rows and columns per latent position.
        channels: latent channels; None takes all the tokenizer has.
        weights: what a tokenizer with weights reads; see the `from_pretrained` of each.
        trust_pickle: read checkpoints that hold pickled objects, which can run any code.

    Raises: InputError for an unknown name, for weights that cannot be read, and for weights of another compression or
        number of channels than asked for.
    """
    if name not in TOKENIZERS:
        raise InputError(f"unknown tokenizer {name!r}: known tokenizers are {', '.join(TOKENIZERS)}")
    if name in COMPUTED:
        if weights is not None:
            raise InputError(f"the tokenizer {name!r} has no weights, but {weights} was given")
        return COMPUTED[name](compression, channels)
    if weights is None:
        raise InputError(f"the tokenizer {name!r} needs weights (--tokenizer-weights): name a folder or a file")
    # These read big libraries or define big networks, so only who asks for them imports them.
    if name == "dcae":
        from mimo.tokenizers.dcae import DCAETokenizer

        tokenizer: Tokenizer = DCAETokenizer.from_pretrained(weights, compression=compression[1])
    else:
        from mimo.tokenizers.videovae import VideoVAETokenizer

        tokenizer = VideoVAETokenizer.from_pretrained(weights, trust_pickle=trust_pickle)
    found, asked = (tokenizer.compression, tokenizer.channels), (tuple(compression), channels or tokenizer.channels)
    if found != asked:
        raise InputError(
            f"{weights}: compresses {found[0]} to {found[1]} channels, but {asked[0]} to {asked[1]} was asked for"
        )
    return tokenizer
