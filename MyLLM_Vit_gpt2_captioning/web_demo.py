"""Caption photos in the browser: give one, say how words are chosen, click a word to see where the model looked for it.

    python MyLLM_Vit_gpt2_captioning/web_demo.py                                 your last run, else examples/shapes
    python MyLLM_Vit_gpt2_captioning/web_demo.py --checkpoint path/to/captioner --port 8000
    python MyLLM_Vit_gpt2_captioning/web_demo.py --host 0.0.0.0                  for the whole local network

It answers on this machine only unless told otherwise, and needs no network. Uploads are deleted after an hour, and when
the demo ends (Ctrl-C). Captions are those of caption_image.py.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import MyLLM_Vit_gpt2_captioning as script  # before attention_maps: it puts MyLLM on the search path
from captioning.command_line.decoding_options import decoding_options
from captioning.command_line.overrides import with_underscores
from captioning.common.files import CONFIG_FILE, WEIGHTS_FILE
from captioning.common.precision import mixed_precision
from captioning.decoding.attention_maps import group_words, overlay, word_maps
from captioning.decoding.search import generate_ids, log_probabilities, trim
from captioning.images.preprocessing import load_image, preprocess
from captioning.model import checkpoint
from captioning.model.tokenizer import encode_prompt

SCENES = script.REPO_ROOT / "examples" / "shapes"
LARGEST_UPLOAD = "20mb"  # of bytes; how many pixels they may hold is load_image's affair
LONGEST_PROMPT = 200  # characters
MAP_SIDE = 480  # pixels of the longer side of a photo under a map
MOST_WAITING = 100  # requests in the queue; more are told to come back
KEPT_SECONDS = 3600  # how long uploads and drawn maps stay
METHODS = ("greedy", "beam search", "sampling")

CAPTIONS_TEMPLATE = """
{{#if value}}
<ol>{{#each value}}<li>
  <span class="words">{{#each words}}<button type="button" data-caption="{{@../index}}" data-word="{{@index}}"
    >{{this}}</button> {{else}}(empty){{/each}}</span>
  <span class="score" title="log-probability of the caption under the model, in nats">log p = {{shown}}</span>
</li>{{/each}}</ol>
{{else}}<p class="score">Captions appear here.</p>{{/if}}
"""
CAPTIONS_STYLE = """
ol { list-style: none; margin: 0; padding: 0; }
li { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1em; padding: 0.35em 0; }
li + li { border-top: 1px solid var(--border-color-primary); }
.words { flex: 1 1 16em; font-size: 1.15em; line-height: 1.6; }
.score { color: var(--body-text-color-subdued); font-size: 0.85em; font-variant-numeric: tabular-nums; }
button { padding: 0 0.15em; margin: 0; border-radius: 4px; font: inherit; cursor: pointer; }
button:hover, button:focus-visible { background: var(--color-accent-soft); }
button.chosen { background: var(--color-accent); color: white; }
"""
# One listener for all words, also of captions to come.
CAPTIONS_SCRIPT = """
element.addEventListener('click', event => {
  const word = event.target.closest('button');
  if (!word) return;
  element.querySelectorAll('button').forEach(other => other.classList.toggle('chosen', other === word));
  trigger('click', {caption: Number(word.dataset.caption), word: Number(word.dataset.word)});
});
"""
STYLE = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
h1 { margin-bottom: 0 !important; }
#photo img, #map img { width: 100%; height: 100%; object-fit: contain; }
#examples .gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(40px, 1fr)); gap: 6px; }
#examples .container, #examples img { width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; }
"""


def find_captioners(root):
    """Trained captioners of this project in `root`/captioner* and `root`/examples -> {name to show: folder}.

    One whose config.json cannot be understood is left out with a warning.
    """
    found = {}
    for pattern in ("captioner*/**/", "examples/**/"):
        for config in sorted(root.glob(pattern + CONFIG_FILE)):
            folder = config.parent
            try:
                if "model_config" in checkpoint.load_config(folder) and (folder / WEIGHTS_FILE).is_file():
                    found[folder.relative_to(root).as_posix()] = folder
            except ValueError as error:
                print(f"warning: left out {error}", file=sys.stderr)
    return found


def choose_captioners(root, first=None):
    """What `find_captioners` finds, with `first` (a folder or hub id, maybe of another kind) at the beginning.

    Raises FileNotFoundError or ValueError when `first` is no captioner, or when there is none at all.
    """
    found = find_captioners(root)
    if first:
        folder = Path(script.read_config(first)[0]).resolve()
        name = next((name for name, other in found.items() if other.resolve() == folder), None)
        name = name or (folder.name if Path(first).is_dir() else first)  # a page that others see names no private path
        found = {name: folder} | {other: path for other, path in found.items() if other != name}
    if not found:
        raise FileNotFoundError("no captioner in captioner/ or examples/: train one, or give --checkpoint FOLDER")
    return found


class Captioners:
    """Captioners by name, loaded when they are first used; the latest stays in memory.

    sources: {name: folder}.
    """

    def __init__(self, sources):
        self.sources, self.latest = sources, None

    def load(self, name):
        """-> (model, tokenizer). Weights that a training run has replaced meanwhile are read again. Raises what
        `load_captioner` raises."""
        folder = self.sources[name]
        state = name, [path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))]
        if self.latest is None or self.latest[0] != state:
            self.latest = None  # the next one needs its memory
            model, tokenizer = script.load_captioner(folder)
            self.latest = state, model.to(script.train_config.device), tokenizer
        return self.latest[1:]


@torch.inference_mode()
def caption_photo(model, tokenizer, photo, options, prompt=""):
    """Caption one photo as `caption_images` does.

    photo: any image that `load_image` takes; options: keyword arguments of `decoding.Options`. Returns a list with a
    dict a caption: its `ids` (a list, BOS and prompt in front, EOS last if it came to its end), its `words`, the whole
    `caption` and its `log_probability` in nats, given photo and prompt.
    """
    device = script.train_config.device
    prompt = encode_prompt(tokenizer, prompt)[: model.config.seq_len - 2]
    autocast, _ = mixed_precision(torch.device(device))
    with autocast():
        levels = model.levels(preprocess(photo, **model.preprocessing)[None].to(device))
        rows = generate_ids(model, levels, torch.tensor([prompt], device=device), **options)  # (captions, T)
        log_p = log_probabilities(model, levels, rows, len(prompt))  # (captions,)
    found = []
    for row, each in zip(rows, log_p.tolist(), strict=True):
        ids = trim(row, len(prompt), model.config.eos_token_id).tolist()
        words = [word for word, _ in group_words(tokenizer, ids)]
        found.append(dict(ids=ids, words=words, caption=tokenizer.decode(ids[1:]).strip(), log_probability=each))
    return found


@contextmanager
def told_to_the_user(photo):
    """Errors that load_image, the options or a checkpoint raise -> gr.Error, with names instead of this machine's
    paths."""
    import gradio

    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error).partition("; replace the file")[0]  # what follows is advice for the owner of a dataset
        text = text.replace(photo, Path(photo).name).replace(f"{script.REPO_ROOT}{os.sep}", "")
        raise gradio.Error(text, print_exception=False) from error


def build(sources):
    """The page, a `gradio.Blocks`. sources: {name: folder} of captioners, of which the first is chosen.

    Programs call its API under the name "caption".
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no word to anybody, also from the import
    import gradio as gr

    # Gradio would open the file itself, and fail without a message; load_image says what is wrong with it. This is set
    # on the class because visitors get components of their own; of a subclass Gradio would write a .pyi file here.
    gr.Image.preprocess = lambda self, payload: payload and payload.path
    captioners = Captioners(sources)

    def write_captions(photo, model, method, number, prompt, beams, penalty, temperature, top_k, top_p, seed):
        if photo is None:
            return [], None
        sampling, beam_search = method == "sampling", method == "beam search"
        chosen = SimpleNamespace(
            sample=sampling,
            temperature=temperature if sampling else None,
            top_k=top_k if sampling else None,
            top_p=top_p if sampling else None,
            seed=seed,
            beam=beams if beam_search else None,
            length_penalty=penalty if beam_search else None,
        )
        with told_to_the_user(photo):
            if len(prompt or "") > LONGEST_PROMPT:
                raise ValueError(f"the prompt has more than {LONGEST_PROMPT} characters")
            options = decoding_options(chosen) | dict(num_return_sequences=1 if method == "greedy" else number)
            found = caption_photo(*captioners.load(model), photo, options, prompt or "")
        rows = [each.pop("ids") for each in found]
        return [each | dict(shown=f"{each['log_probability']:.2f}") for each in found], (model, photo, rows)

    def clear_unreadable(photo):
        try:
            load_image(photo)
        except (OSError, ValueError):
            return None, [], None
        return gr.skip(), gr.skip(), gr.skip()  # something else was wrong: the photo stays

    def show_word(state, event: gr.EventData):
        name, photo, rows = state
        with told_to_the_user(photo):
            words, maps = word_maps(*captioners.load(name), photo, rows[event.caption])
            drawn = overlay(photo, maps[event.word], MAP_SIDE)
            width, height = load_image(photo).size
        scale = MAP_SIDE / max(width, height)
        drawn = drawn.resize((max(1, round(scale * width)), max(1, round(scale * height))))  # as the photo is seen
        return gr.Image(drawn, visible=True, label=f'Where it looked for "{words[event.word]}"')

    with gr.Blocks(
        title="Image captioning", analytics_enabled=False, fill_width=True, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.Markdown("# Image captioning\nGive it a photo; then click a word to see where the model looked for it.")
        state = gr.State()  # what the captions on the page were made from: (model's name, photo, ids of each caption)
        with gr.Row():
            with gr.Column():
                photo = gr.Image(
                    label="Photo",
                    sources=["upload", "webcam", "clipboard"],
                    type="filepath",
                    image_mode=None,
                    height=340,
                    buttons=[],
                    elem_id="photo",
                )
                scenes = [str(path) for path in sorted(SCENES.glob("scene_*.png"))]
                examples = gr.Examples(scenes, photo, label="Or try one of these", elem_id="examples")
            with gr.Column():
                captions = gr.HTML(
                    [],
                    label="Captions",
                    show_label=True,
                    container=True,
                    padding=True,
                    elem_id="captions",
                    html_template=CAPTIONS_TEMPLATE,
                    css_template=CAPTIONS_STYLE,
                    js_on_load=CAPTIONS_SCRIPT,
                )
                drawn = gr.Image(interactive=False, buttons=[], height=340, visible=False, elem_id="map")
        with gr.Row():
            method = gr.Radio(METHODS, value="greedy", label="Words are chosen by", scale=4, min_width=340)
            prompt = gr.Textbox(
                "", label="The caption begins with", max_length=LONGEST_PROMPT, max_lines=1, scale=3, min_width=240
            )
            model = gr.Dropdown(list(sources), value=next(iter(sources)), label="Model", scale=3, min_width=240)
        with gr.Row(visible=False) as more:
            slider = partial(gr.Slider, visible=False, buttons=[], min_width=150)
            number = slider(1, 10, 3, step=1, label="Captions")
            beams = slider(2, 10, 4, step=1, label="Beams")
            penalty = slider(-2, 3, 1.0, step=0.1, label="Length penalty")
            temperature = slider(0.1, 2, 1.0, step=0.05, label="Temperature")
            top_k = slider(0, 200, 0, step=1, label="Top-k (0: all)")
            top_p = slider(0.05, 1, 1.0, step=0.05, label="Top-p")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, visible=False, min_width=150)
        shown_for = {number: METHODS[1:], beams: METHODS[1:2], penalty: METHODS[1:2]}
        shown_for |= dict.fromkeys((temperature, top_k, top_p, seed), METHODS[2:])
        button = gr.Button("Caption", variant="primary")

        # One at a time: a captioner at work is not shared, and two would only slow each other down.
        alone = dict(concurrency_limit=1, concurrency_id="captioner")
        events = [photo.input, button.click, prompt.submit]
        inputs = [photo, model, method, number, prompt, beams, penalty, temperature, top_k, top_p, seed]
        outputs = [captions, state]
        for event in (
            gr.on(events, write_captions, inputs, outputs, api_name="caption", **alone),
            examples.load_input_event.then(write_captions, inputs, outputs, api_visibility="private", **alone),
        ):
            event.failure(clear_unreadable, photo, [photo, *outputs], api_visibility="private")
        captions.change(lambda: gr.Image(None, visible=False), None, drawn, api_visibility="private", queue=False)
        captions.click(show_word, state, drawn, api_visibility="private", **alone)
        method.change(
            lambda chosen: [
                gr.Row(visible=chosen != "greedy"),
                *(type(control)(visible=chosen in methods) for control, methods in shown_for.items()),
            ],
            method,
            [more, *shown_for],
            api_visibility="private",
            queue=False,
        )
    return page.queue(max_size=MOST_WAITING)


def check_address(host, port):
    """Raise OSError where nothing can listen on `host` and `port` (None: any)."""
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as error:
        place = host if port is None else f"{host}, port {port}"
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0].rstrip(".")
        raise OSError(f"cannot listen on {place} ({reason}); choose another --host or --port") from error


def launch(page, host="127.0.0.1", port=None, share=False, **options):
    """Serve the page of `build`; all that it loads comes from here -> what `gradio.Blocks.launch` returns."""
    import gradio as gr

    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=LARGEST_UPLOAD,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        **options,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        help='folder or hub id "user/repo" to begin with, ours or a Hugging Face ViT + GPT-2 (default: captioner, else '
        "examples/shapes); those in captioner*/ and examples/ can be chosen on the page",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="also at a public address, through Gradio's servers")
    args = parser.parse_args(with_underscores(sys.argv[1:] if argv is None else argv))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as with Ctrl-C
    try:
        with tempfile.TemporaryDirectory(prefix="web_demo_") as uploads:
            os.environ["GRADIO_TEMP_DIR"] = uploads
            page = build(choose_captioners(script.REPO_ROOT, args.checkpoint))
            check_address(args.host, args.port)
            _, url, public_url = launch(page, args.host, args.port, args.share, quiet=True, prevent_thread_lock=True)
            if args.share and not public_url:
                print("warning: there is no public address: Gradio's servers were not reached", file=sys.stderr)
            print(f"{public_url or url} (Ctrl-C ends it)", flush=True)
            try:
                while True:
                    time.sleep(1)
            finally:
                page.close(verbose=False)  # its block_thread would wait until every open page goes away
    except KeyboardInterrupt:
        pass
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        sys.exit("error: the web demo needs gradio: pip install -r requirements-extra.txt")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
