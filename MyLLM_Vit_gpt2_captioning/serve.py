"""Serve a captioner over HTTP, as OpenAI's API does: any of its clients can ask it.

    python MyLLM_Vit_gpt2_captioning/serve.py                                      the model in captioner/
    python MyLLM_Vit_gpt2_captioning/serve.py --checkpoint examples/shapes --port 8000
    CAPTIONER_API_KEY=secret python MyLLM_Vit_gpt2_captioning/serve.py --host 0.0.0.0   for others, who need the key

It answers POST /v1/chat/completions with a caption for each image, and GET /v1/models, /health and /metrics
(Prometheus). By default only this machine can reach it, and it fetches nothing. Requests that wait are captioned
together. Ctrl-C or SIGTERM: what has been asked is answered, then it ends; Ctrl-C once more ends it at once.
"""

import os
import signal
import sys
from pathlib import Path

from captioning.command_line.arguments import ToolParser, integer
from captioning.command_line.decoding_options import add_beam_arguments, add_precision_argument, decoding_options
from captioning.command_line.overrides import with_underscores
from captioning.common.printable import printable
from captioning.decoding.confidence import Confidence
from captioning.decoding.search import Options
from captioning.scoring.calibration import MEANING
from captioning.serving.addresses import is_loopback, listen
from MyLLM_Vit_gpt2_captioning import OUTPUT_DIR, REPO_ROOT, load_captioner, stored_config, train_config

KEY_VARIABLE = "CAPTIONER_API_KEY"  # of the environment
STOP_SECONDS = 60  # in which what has been asked must be answered when the server ends


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        default=OUTPUT_DIR,
        help='folder or hub id "user/repo", ours or a Hugging Face ViT + GPT-2 (default: captioner)',
    )
    parser.add_argument("--model_name", metavar="NAME", help="what clients call the model (default: the checkpoint's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--port", type=integer(0, 65535), default=8000, help="port to listen on, 0 for any free one (default: 8000)"
    )
    add_beam_arguments(parser)
    add_precision_argument(parser)
    parser.add_argument(
        "--text",
        choices=("prompt", "question", "ignore"),
        help="what the text of a request is: the beginning of the caption, a question, or nothing (default: question "
        "for a captioner that was calibrated on questions, else prompt)",
    )
    parser.add_argument("--allow_urls", action="store_true", help="also fetch images from public addresses")
    parser.add_argument(
        "--batch_size", type=integer(1), default=32, metavar="N", help="images captioned at a time (default: 32)"
    )
    parser.add_argument(
        "--max_queue",
        type=integer(1),
        default=100,
        metavar="N",
        help="unanswered requests; more get 429 (default: 100)",
    )
    parser.add_argument(
        "--max_bytes", type=integer(1), default=20_000_000, metavar="N", help="of a request (default: 20,000,000)"
    )
    parser.add_argument(
        "--max_pixels", type=integer(1), default=50_000_000, metavar="N", help="of an image (default: 50,000,000)"
    )
    args = parser.parse_args(with_underscores(sys.argv[1:] if argv is None else argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before and behind uvicorn, which handles it itself
    try:
        serve(args)
    except KeyboardInterrupt:
        pass
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        sys.exit(f"error: the server needs {error.name}: pip install -r requirements-extra.txt")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def serve(args):
    """Serve as the parsed command line says, until a signal comes. Raises OSError or ValueError when it cannot."""
    options = Options(**decoding_options(args))
    import uvicorn

    from captioning.serving.app import Metrics, Served, build_app
    from captioning.serving.caption_queue import CaptionQueue

    api_key = os.environ.get(KEY_VARIABLE) or None
    if api_key is None and not is_loopback(args.host):
        raise ValueError(f"--host {args.host}: others could use the server; set a key in the environment variable "
                         f"{KEY_VARIABLE}, which they must have")  # fmt: skip
    folder, _ = stored_config(args.checkpoint)
    known = Confidence.load(folder)
    asked_questions = known is not None and known.about.get("meaning") == MEANING["questions"]
    with listen(args.host, args.port) as listener:
        model, tokenizer = load_captioner(folder)
        model.to(train_config.device)
        metrics = Metrics()
        served = Served(
            name=args.model_name or name_of(args.checkpoint),
            options=options,
            meaning=args.text or ("question" if asked_questions else "prompt"),
            api_key=api_key,
            host=args.host,
            allow_urls=args.allow_urls,
            max_bytes=args.max_bytes,
            max_pixels=args.max_pixels,
            max_queue=args.max_queue,
        )
        with CaptionQueue(model, tokenizer, known, args.batch_size, args.precision, metrics.on_batch) as captions:
            config = uvicorn.Config(
                build_app(served, captions, metrics),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
            host = f"[{args.host}]" if ":" in args.host else args.host
            if known is None:
                print(f"{args.checkpoint} is not calibrated: its captions come without confidence", file=sys.stderr)
            print(
                f"http://{host}:{listener.getsockname()[1]}/v1 serves {printable(served.name)} "
                f"({'with' if api_key else 'without'} an API key; text: {served.meaning}; Ctrl-C ends it)",
                flush=True,
            )
            uvicorn.Server(config).run(sockets=[listener])


def name_of(checkpoint):
    """What clients call a checkpoint: a hub id, or a folder's path within the repository, or else its name; others must
    not see the paths of this machine."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(checkpoint)
    folder = folder.resolve()
    return folder.relative_to(REPO_ROOT).as_posix() if folder.is_relative_to(REPO_ROOT) else folder.name


if __name__ == "__main__":
    main()
