"""The options of a tool that say how words are chosen."""


def add_decoding_arguments(parser):
    """The options that say how a tool chooses words; `decoding_options` reads them."""
    parser.add_argument("--beam", type=int, metavar="N", help="beam search with N beams (default: greedy)")
    parser.add_argument("--length_penalty", type=float, help="of beam search; above 1 longer captions (default: 1.0)")
    parser.add_argument("--sample", action="store_true", help="draw the words")
    parser.add_argument("--temperature", type=float, help="of the draws; given, words are drawn (default: 1.0)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest words only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest words that have this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--precision",
        default="auto",
        help='"float32", "bf16" (on newer CPUs faster, a few words may differ) or "auto": bf16 or fp16 on CUDA only',
    )


def decoding_options(args):
    """Parsed arguments -> keyword arguments of `decoding.Options`. Raises ValueError for two ways at once."""
    draws = {key: value for key in ("temperature", "top_k", "top_p") if (value := getattr(args, key)) is not None}
    if args.sample or draws:
        if args.beam is not None or args.length_penalty is not None:
            raise ValueError("choose beam search (--beam) or sampling (--sample, --temperature, --top_k, --top_p)")
        return dict(deterministic=False, seed=args.seed, **draws)
    if args.length_penalty is not None and (args.beam or 1) < 2:
        raise ValueError("--length_penalty is for beam search: give --beam 2 or more")
    penalty = 1.0 if args.length_penalty is None else args.length_penalty
    return dict(deterministic=True, num_beams=1 if args.beam is None else args.beam, length_penalty=penalty)
