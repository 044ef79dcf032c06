"""The command-line options that choose greedy search, sampling or beam search."""

from captioning.command_line.arguments import integer, real


def add_beam_arguments(parser):
    """Add the options of beam search to a tool's parser."""
    parser.add_argument(
        "--beam", type=integer(1), metavar="N", help="beam search with N beams (default: greedy search)"
    )
    parser.add_argument(
        "--length_penalty", type=real(), metavar="X", help="of beam search; above 1 longer captions (default: 1.0)"
    )


def add_precision_argument(parser):
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16"),
        default="auto",
        help="bf16 is faster on newer CPUs, a few words may differ; auto is bf16 or fp16 on CUDA, else float32",
    )


def add_decoding_arguments(parser):
    """Add all options to a tool's parser; `decoding_options` reads them."""
    add_beam_arguments(parser)
    parser.add_argument("--sample", action="store_true", help="sampling: draw the words at random")
    parser.add_argument(
        "--temperature", type=real(above=0), metavar="X", help="of sampling, which it turns on (default: 1.0)"
    )
    parser.add_argument(
        "--top_k", type=integer(0), metavar="K", help="sample from the K likeliest words only (default: 0, all)"
    )
    parser.add_argument(
        "--top_p",
        type=real(above=0, at_most=1),
        metavar="P",
        help="sample from the likeliest words that have the probability P together",
    )
    parser.add_argument("--seed", type=integer(0, 2**64 - 1), default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument(
        "--min_tokens", type=integer(0), default=0, metavar="N", help="shortest caption, in tokens (default: 0)"
    )
    parser.add_argument(
        "--max_words", type=integer(0), default=0, metavar="N", help="longest caption, in words (default: 0, any)"
    )
    parser.add_argument(
        "--max_chars",
        type=integer(0),
        default=0,
        metavar="N",
        help="longest caption, in characters, as for alt text (default: 0, any)",
    )
    add_precision_argument(parser)


def decoding_options(args):
    """Parsed arguments, those of sampling may be missing -> keyword arguments of `search.Options`.

    Raises ValueError when they ask for sampling and beam search at once.
    """
    lengths = {key: getattr(args, key, 0) for key in ("min_tokens", "max_words", "max_chars")}
    keys = ("temperature", "top_k", "top_p")
    sampling = {key: value for key in keys if (value := getattr(args, key, None)) is not None}
    if getattr(args, "sample", False) or sampling:
        if args.beam is not None or args.length_penalty is not None:
            raise ValueError("choose beam search (--beam) or sampling (--sample, --temperature, --top_k, --top_p)")
        return dict(deterministic=False, seed=args.seed, **sampling, **lengths)
    if args.length_penalty is not None and (args.beam or 1) < 2:
        raise ValueError("--length_penalty is for beam search: give --beam 2 or more")
    penalty = 1.0 if args.length_penalty is None else args.length_penalty
    beams = 1 if args.beam is None else args.beam
    return dict(deterministic=True, num_beams=beams, length_penalty=penalty, **lengths)
