"""Caption photos in the browser: give one, choose how words are chosen, click a word to see its attention map.

    python MyLLM_Vit_gpt2_captioning/web_demo.py                                 your last run, else examples/shapes
    python MyLLM_Vit_gpt2_captioning/web_demo.py --checkpoint path/to/captioner --port 8000
    python MyLLM_Vit_gpt2_captioning/web_demo.py --host 0.0.0.0                  for the whole local network

By default it answers on this machine only, and it needs no network. Uploads are deleted after an hour, and when the
demo ends (Ctrl-C). Captions are those of caption_image.py.
"""

import os
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import MyLLM_Vit_gpt2_captioning as script  # before attention_maps: it puts MyLLM on the search path
from captioning.command_line.arguments import ToolParser, integer
from captioning.command_line.decoding_options import decoding_options
from captioning.command_line.overrides import with_underscores
from captioning.common.files import CONFIG_FILE, TORCH_FILE, is_litter
from captioning.common.precision import mixed_precision
from captioning.common.printable import printable
from captioning.decoding.attention_maps import group_words, overlay, word_maps
from captioning.decoding.confidence import Confidence
from captioning.decoding.search import generate_ids, log_probabilities, trim
from captioning.images.preprocessing import load_image, preprocess
from captioning.model import checkpoint
from captioning.model.tokenizer import read_prompt
from captioning.pages.html_pages import shade
from captioning.serving.addresses import OnlyOwnHosts, listen

SCENES = script.REPO_ROOT / "examples" / "shapes"
MAX_UPLOAD = "20mb"  # size of a file; load_image limits the number of pixels
MAX_PROMPT = 200  # characters
MAP_SIDE = 480  # pixels of the longer side of a photo with an attention map
MAX_QUEUE = 100  # waiting requests; further ones are refused
KEPT_SECONDS = 3600  # how long uploads and attention maps are kept
METHODS = ("greedy", "beam search", "sampling")

# Gradio makes JavaScript of what comes out of this template (a template literal), so `${...}` in a caption would run:
# words are written as HTML entities, see `as_entities`.
CAPTIONS_TEMPLATE = """
{{#if value}}
<ol>{{#each value}}<li>
  <span class="words">{{#each html}}<button type="button" data-caption="{{@../index}}" data-word="{{@index}}"
    style="{{lookup ../shades @index}}" title="{{lookup ../titles @index}}"
    >{{{this}}}</button> {{else}}(empty){{/each}}</span>
  <span class="score" title="{{explained}}">{{shown}}</span>
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
# One listener for all words, those of later captions included.
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
    """The trained captioners of this project in `root`/captioner* and `root`/examples -> {displayed name: folder}.

    Those whose config.json cannot be read are left out with a warning.
    """
    captioners = {}
    for pattern in ("captioner*/**/", "examples/**/"):
        for config in sorted(root.glob(pattern + CONFIG_FILE)):
            folder = config.parent
            if is_litter(config.relative_to(root)):
                continue
            try:
                if "model_config" in checkpoint.load_config(folder) and checkpoint.weights_file(folder).is_file():
                    captioners[folder.relative_to(root).as_posix()] = folder
            except ValueError as error:
                print(f"warning: left out {error}", file=sys.stderr)
    return captioners


def choose_captioners(root, first=None):
    """The captioners of `find_captioners`, with `first` (a folder or hub id, also of a Hugging Face captioner) at the
    beginning.

    Raises FileNotFoundError or ValueError when `first` is not a captioner, or when there is none at all.
    """
    captioners = find_captioners(root)
    if first:
        folder = Path(script.stored_config(first)[0]).resolve()
        name = next((name for name, other in captioners.items() if other.resolve() == folder), None)
        name = name or (folder.name if Path(first).is_dir() else first)  # visitors of the page must not see the path
        captioners = {name: folder} | {other: path for other, path in captioners.items() if other != name}
    if not captioners:
        raise FileNotFoundError("no captioner in captioner/ or examples/: train one, or give --checkpoint FOLDER")
    return captioners


class Captioners:
    """Captioners by name, loaded on use; the last one stays in memory.

    sources: {name: folder}.
    """

    def __init__(self, sources):
        self.sources, self.last = sources, None

    def load(self, name):
        """-> (model, tokenizer). Weights that a training run has replaced since are loaded again. Raises the errors of
        `load_captioner`."""
        folder = self.sources[name]
        key = (
            name,
            [
                path.stat().st_mtime_ns
                for pattern in ("*.safetensors", TORCH_FILE)
                for path in sorted(folder.glob(pattern))
            ],
        )
        if self.last is None or self.last[0] != key:
            self.last = None  # frees its memory for the next one
            model, tokenizer = script.load_captioner(folder)
            self.last = key, model.to(script.train_config.device), tokenizer
        return self.last[1:]

    def confidence(self, name):
        """-> the captioner's `Confidence`, None where it is not calibrated."""
        return Confidence.load(self.sources[name])


def shown_with(caption):
    """What the page shows beside a caption of `caption_photo` -> dict for CAPTIONS_TEMPLATE. The less sure a word, the
    redder its ground."""
    text = f"log p = {caption['log_probability']:.2f}"
    explained = "log-probability of the caption under the model, in nats"
    if "confidence" not in caption:
        return dict(shown=f"{text}, not calibrated", explained=f"{explained}; this captioner has no confidence")
    of_words = caption["word_confidences"]
    return dict(
        shown=f"confidence {caption['confidence']:.0%}, {text}",
        explained=f"how likely the caption is right, and the {explained}",
        shades=["" if sure is None else shade(sure) for sure in of_words],
        titles=["" if sure is None else f"confidence {sure:.0%}" for sure in of_words],
    )


@torch.inference_mode()
def caption_photo(model, tokenizer, photo, options, prompt="", known=None):
    """Caption one photo as `caption_images` does.

    photo: any image that `load_image` takes; options: keyword arguments of `search.Options`. Returns a list with a
    dict for each caption: its `ids` (a list from BOS and prompt to EOS, if that was reached), its `words`, the whole
    `caption` and its `log_probability` in nats, given photo and prompt; of a calibrated captioner, whose `Confidence`
    is `known`, also its `confidence` and that of its words, `word_confidences` (None for a word of the prompt).
    """
    device = script.train_config.device
    prompt = read_prompt(tokenizer, prompt, model.config)
    length = len(prompt.ids)
    autocast, _ = mixed_precision(torch.device(device))
    with autocast():
        pixels = preprocess(photo, **model.preprocessing)[None].to(device)  # (1, 3, H, W)
        levels = model.levels(pixels)
        sequences = torch.tensor([prompt.ids], device=device)  # (1, T)
        rows = generate_ids(model, levels, sequences, tokenizer=tokenizer, **options)  # (captions, T + new)
        log_probs = log_probabilities(model, levels, rows, length)  # (captions,)
        judged = known.judge(model, tokenizer, levels, rows, length, pixels) if known else [None] * len(rows)
    captions = []
    for row, log_prob, one in zip(rows, log_probs.tolist(), judged, strict=True):
        ids = trim(row, length, model.config.eos_token_id).tolist()
        words = [printable(word) for word, _ in group_words(tokenizer, ids)]
        captions.append(dict(ids=ids, words=words, caption=prompt.caption(tokenizer, ids), log_probability=log_prob))
        if one:
            of_prompt = [None] * (len(words) - len(one.words))
            captions[-1] |= dict(confidence=one.caption, word_confidences=of_prompt + one.words)
    return captions


def as_entities(text):
    """A text -> HTML that shows it, without any character that means something in HTML or JavaScript."""
    return "".join(char if char.isalnum() or char == " " else f"&#{ord(char)};" for char in text)


@contextmanager
def errors_shown_on_page(photo):
    """Context that turns the errors of load_image, options and checkpoints into gr.Error, without this machine's
    paths."""
    import gradio

    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error).partition("; replace the file")[0]  # the rest is advice for the owner of a dataset
        text = text.replace(photo, Path(photo).name).replace(f"{script.REPO_ROOT}{os.sep}", "")
        raise gradio.Error(text, print_exception=False) from error


def check_inputs(components, values):
    """Raise gradio.Error with the reason for values, as a program sends them, that do not fit the `components`."""
    import gradio as gr

    for component, value in zip(components, values, strict=False):
        if isinstance(component, gr.Image) and not (value is None or isinstance(value, dict)):
            raise gr.Error(
                f"{component.label}: expected a file, as handle_file(path or URL) of gradio_client makes it, not "
                f"{printable(repr(value)[:40])}",
                print_exception=False,
            )
        if isinstance(component, (gr.Slider, gr.Number)):
            step = component.step if isinstance(component, gr.Slider) else 1
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or (step == 1 and value != int(value)):
                kind = "a whole number" if step == 1 else "a number"
                raise gr.Error(
                    f"{component.label}: expected {kind}, not {printable(repr(value)[:40])}", print_exception=False
                )


def with_reasons(page):
    """The page, on which what a program sends is checked before Gradio reads it: its own errors have no reason."""
    preprocess = page.preprocess_data

    async def checked(block_fn, inputs, *args, **options):
        check_inputs(block_fn.inputs, inputs)
        return await preprocess(block_fn, inputs, *args, **options)

    page.preprocess_data = checked
    return page


def _add_photo_and_captions():
    """Add the upper part of the page -> its components (photo, examples, captions, attention map)."""
    import gradio as gr

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
            attention_map = gr.Image(interactive=False, buttons=[], height=340, visible=False, elem_id="map")
    return photo, examples, captions, attention_map


def _add_options(sources):
    """Add the options -> (the components in the order of `write_captions`' arguments after the photo, the row of those
    that only some methods have, {component in it: names of these methods})."""
    import gradio as gr

    with gr.Row():
        method = gr.Radio(METHODS, value="greedy", label="Words are chosen by", scale=4, min_width=340)
        prompt = gr.Textbox(
            "", label="The caption begins with", max_length=MAX_PROMPT, max_lines=1, scale=3, min_width=240
        )
        model = gr.Dropdown(list(sources), value=next(iter(sources)), label="Model", scale=3, min_width=240)
    with gr.Row(visible=False) as method_options:
        slider = partial(gr.Slider, visible=False, buttons=[], min_width=150)
        number = slider(1, 10, 3, step=1, label="Captions")
        beams = slider(2, 10, 4, step=1, label="Beams")
        penalty = slider(-2, 3, 1.0, step=0.1, label="Length penalty")
        temperature = slider(0.1, 2, 1.0, step=0.05, label="Temperature")
        top_k = slider(0, 200, 0, step=1, label="Top-k (0: all)")
        top_p = slider(0.05, 1, 1.0, step=0.05, label="Top-p")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, visible=False, min_width=150)
    with gr.Accordion("Length", open=False), gr.Row():
        limit = partial(gr.Number, 0, precision=0, minimum=0, min_width=150)
        lengths = [
            limit(label="At least so many tokens", maximum=50),
            limit(label="At most so many words (0: any)", maximum=1000),
            limit(label="At most so many characters (0: any)", maximum=10_000),
        ]
    methods_of = {number: METHODS[1:], beams: METHODS[1:2], penalty: METHODS[1:2]}
    methods_of |= dict.fromkeys((temperature, top_k, top_p, seed), METHODS[2:])
    controls = [model, method, number, prompt, beams, penalty, temperature, top_k, top_p, seed, *lengths]
    return controls, method_options, methods_of


def build(sources):
    """Build the page, a `gradio.Blocks`. sources: {name: folder} of captioners; the first is selected.

    The API for programs has the name "caption".
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would send analytics too
    import gradio as gr

    # By default Gradio opens the file itself and fails without a message; load_image says what is wrong with it. This
    # is set on the class because visitors get components of their own; for a subclass Gradio would write a .pyi file.
    gr.Image.preprocess = lambda self, payload: payload and payload.path
    captioners = Captioners(sources)

    def write_captions(
        photo, model, method, number, prompt, beams, penalty, temperature, top_k, top_p, seed,
        min_tokens, max_words, max_chars,
    ):  # fmt: skip
        if photo is None:
            return [], None
        number, beams, top_k, seed = int(number), int(beams), int(top_k), int(seed)  # JSON has no whole numbers
        sampling, beam_search = method == "sampling", method == "beam search"
        args = SimpleNamespace(
            sample=sampling,
            temperature=temperature if sampling else None,
            top_k=top_k if sampling else None,
            top_p=top_p if sampling else None,
            seed=seed,
            beam=beams if beam_search else None,
            length_penalty=penalty if beam_search else None,
            min_tokens=min_tokens,
            max_words=max_words,
            max_chars=max_chars,
        )
        with errors_shown_on_page(photo):
            if len(prompt or "") > MAX_PROMPT:
                raise ValueError(f"the prompt has more than {MAX_PROMPT} characters")
            options = decoding_options(args) | dict(num_return_sequences=1 if method == "greedy" else number)
            known = captioners.confidence(model)
            captioner = captioners.load(model)
            if warning := read_prompt(captioner[1], prompt or "", captioner[0].config).warning():
                gr.Warning(warning)
            captions = caption_photo(*captioner, photo, options, prompt or "", known)
        rows = [caption.pop("ids") for caption in captions]
        for caption in captions:
            caption |= shown_with(caption)
            caption["html"] = [as_entities(word) for word in caption["words"]]
        return captions, (model, photo, rows)

    def clear_unreadable(photo):
        try:
            load_image(photo)
        except (OSError, ValueError):
            return None, [], None
        return gr.skip(), gr.skip(), gr.skip()  # another error: the photo stays

    def show_word(state, event: gr.EventData):
        name, photo, rows = state
        with errors_shown_on_page(photo):
            words, maps = word_maps(*captioners.load(name), photo, rows[event.caption])
            picture = overlay(photo, maps[event.word], MAP_SIDE)
            width, height = load_image(photo).size
        scale = MAP_SIDE / max(width, height)
        picture = picture.resize((max(1, round(scale * width)), max(1, round(scale * height))))  # the photo's aspect
        return gr.Image(picture, visible=True, label=f'Where it looked for "{words[event.word]}"')

    with gr.Blocks(
        title="Image captioning", analytics_enabled=False, fill_width=True, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.Markdown("# Image captioning\nGive it a photo; then click a word to see where the model looked for it.")
        state = gr.State()  # of the captions on the page: (model's name, photo, ids of each caption)
        photo, examples, captions, attention_map = _add_photo_and_captions()
        controls, method_options, methods_of = _add_options(sources)
        method, prompt = controls[1], controls[3]
        button = gr.Button("Caption", variant="primary")

        # One request at a time: a captioner in use is not shared, and two would only slow each other down.
        one_at_a_time = dict(concurrency_limit=1, concurrency_id="captioner")
        events = [photo.input, button.click, prompt.submit]
        inputs = [photo, *controls]
        outputs = [captions, state]
        for event in (
            gr.on(events, write_captions, inputs, outputs, api_name="caption", **one_at_a_time),
            examples.load_input_event.then(write_captions, inputs, outputs, api_visibility="private", **one_at_a_time),
        ):
            event.failure(clear_unreadable, photo, [photo, *outputs], api_visibility="private")
        captions.change(
            lambda: gr.Image(None, visible=False), None, attention_map, api_visibility="private", queue=False
        )
        captions.click(show_word, state, attention_map, api_visibility="private", **one_at_a_time)
        method.change(
            lambda chosen: [
                gr.Row(visible=chosen != "greedy"),
                *(type(control)(visible=chosen in methods) for control, methods in methods_of.items()),
            ],
            method,
            [method_options, *methods_of],
            api_visibility="private",
            queue=False,
        )
    return with_reasons(page.queue(max_size=MAX_QUEUE))


def launch(page, host="127.0.0.1", port=None, share=False, **options):
    """Serve the page of `build`, which loads everything from this server -> the result of `gradio.Blocks.launch`."""
    import gradio as gr
    from starlette.middleware import Middleware

    return page.launch(
        app_kwargs=dict(middleware=[Middleware(OnlyOwnHosts, host, [".gradio.live"] * share)]),
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=MAX_UPLOAD,
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
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        help='folder or hub id "user/repo" selected at first, ours or a Hugging Face ViT + GPT-2 (default: captioner, '
        "else examples/shapes); the page also offers those in captioner*/ and examples/",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--port", type=integer(0, 65535), help="port to listen on (default: the first free one from 7860 on)"
    )
    parser.add_argument("--share", action="store_true", help="also at a public address, through Gradio's servers")
    args = parser.parse_args(with_underscores(sys.argv[1:] if argv is None else argv))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends the demo like Ctrl-C
    try:
        with tempfile.TemporaryDirectory(prefix="web_demo_") as uploads:
            os.environ["GRADIO_TEMP_DIR"] = uploads
            page = build(choose_captioners(script.REPO_ROOT, args.checkpoint))
            listen(args.host, args.port).close()  # Gradio's own error names neither the option nor a remedy
            _, url, public_url = launch(page, args.host, args.port, args.share, quiet=True, prevent_thread_lock=True)
            if args.share and not public_url:
                print("warning: there is no public address: Gradio's servers were not reached", file=sys.stderr)
            print(f"{public_url or url} (Ctrl-C ends it)", flush=True)
            try:
                while True:
                    time.sleep(1)
            finally:
                page.close(verbose=False)  # block_thread would wait until all visitors have closed the page
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
