"""A shared captioner as a model of transformers (5 or newer), with the source code in the shared folder.

    from transformers import pipeline

    captioner = pipeline("image-text-to-text", model="user/repo", trust_remote_code=True)
    captioner(images="photo.jpg", text="")

transformers copies this file alone and imports the copy. The model itself is the one in source/, which is put on the
import path when the captioner or its processor is loaded. `generate` is transformers' own, with all its options; it
starts from the same tokens, sees the same pixels and gets the same logits as in the project, so the captions are the
same, token for token.
"""

import filecmp
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import BatchFeature, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput

SCRIPT = "MyLLM_Vit_gpt2_captioning"  # of the project: a folder, and in it a module of the same name
SOURCE, WEIGHTS_FILE = "source", "captioner.safetensors"
CACHE = ALL_CACHE_NAMES[0]  # the name of the KV cache among `generate`'s arguments differs between versions
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def shared_folder(name_or_path, options):
    """A folder, or a Hub id of which the shared files are then downloaded -> Path. `options` may hold HUB_OPTIONS."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    given = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    return Path(snapshot_download(str(name_or_path), allow_patterns=[f"{SOURCE}/*", "*.json", WEIGHTS_FILE], **given))


def load_source(folder):
    """Import the project from `folder`/source -> its script, a module.

    Where it is imported already, by another captioner or because this is a checkout of the project, that one is used.
    Raises ImportError when that one is another version: one process holds one.
    """
    source = Path(folder) / SOURCE
    if SCRIPT not in sys.modules:
        if not (source / SCRIPT / f"{SCRIPT}.py").is_file():
            raise ImportError(f"{source}: the captioner's source code is missing; take another copy of its folder")
        sys.path[:0] = [str(source / SCRIPT), str(source)]
    script = import_module(SCRIPT)
    root = Path(script.__file__).absolute().parents[1]  # not resolved: in the Hub's cache, each file is a link
    for file in source.rglob("*.py"):
        loaded = root / file.relative_to(source)
        if not loaded.is_file() or not filecmp.cmp(file, loaded, shallow=False):
            raise ImportError(
                f"{file} is not the same as {loaded}, which this process has loaded: use captioners that come with "
                "different versions of the project in one process each"
            )
    return script


def copy_source(folder, target):
    """Copy the source code in the shared `folder` to the folder `target`."""
    if Path(folder).resolve() != Path(target).resolve():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(folder) / SOURCE, Path(target) / SOURCE, ignore=ignore, dirs_exist_ok=True)


class CaptionerConfig(PreTrainedConfig):
    """config.json of a shared captioner: `model_config` and `preprocessing` are the project's, dicts."""

    model_type = "myllm-vit-gpt2-captioner"

    def __init__(self, model_config=None, preprocessing=None, **kwargs):
        self.model_config, self.preprocessing = model_config or {}, preprocessing or {}
        self.vocab_size = self.model_config.get("vocab_size")
        self.max_position_embeddings = self.model_config.get("seq_len")
        super().__init__(**kwargs)


class DecodedTokens:
    """The KV cache of growing captions: `length` tokens of each row, padding on the left included.

    Images whose prompts have equally much padding are decoded together and without it, so that a caption does not
    depend on the other prompts of its batch. The rows of an image are adjacent and share what is stored of it.
    """

    def __init__(self, captioner, image_states, padding):
        """`image_states`: `VisionGPT2Model.encoder_states` of B images; `padding` (B * K,): tokens of it in a row."""
        B = len(image_states[0])
        padding = padding.view(B, -1)  # (B, K)
        if (padding != padding[:, :1]).any():
            raise ValueError("the captions of one image must have equally much padding")
        self.captioner, self.length, self.groups = captioner, 0, []
        for amount in padding[:, 0].unique().tolist():
            images = (padding[:, 0] == amount).nonzero()[:, 0]
            kept = {id(states): states[images] for states in image_states}  # blocks may share the same tensor
            rows = torch.arange(padding.numel(), device=padding.device).view(B, -1)[images].flatten()
            states = [kept[id(states)] for states in image_states]
            caches = captioner.new_caches(captioner.config.seq_len)
            self.groups.append(SimpleNamespace(rows=rows, padding=amount, states=states, caches=caches))

    def append(self, input_ids):
        """input_ids (B * K, T), those that are new -> hidden states (B * K, T, embed_dim), zeros at padding."""
        hidden = None
        for group in self.groups:
            padding = max(0, group.padding - self.length)
            new = self.captioner.decode(input_ids[group.rows, padding:], group.states, group.caches)
            if hidden is None:
                hidden = new.new_zeros(*input_ids.shape, new.size(-1))
            hidden[group.rows, padding:] = new
        self.length += input_ids.size(1)
        return hidden

    def reorder_cache(self, rows):
        """Keep the captions `rows` (B * K,), in which each image keeps its place, as in every step of beam search."""
        for group in self.groups:
            rows = rows.to(group.rows)  # transformers has them in int32
            place = torch.empty_like(rows)
            place[group.rows] = torch.arange(len(group.rows), device=rows.device)
            for cache in group.caches:
                cache.select(place[rows[group.rows]])


@dataclass
class CaptionerOutput(ModelOutput):
    """logits (B * K, T, vocab_size), float32; the KV cache behind these tokens, or None."""

    logits: torch.Tensor | None = None
    decoded: DecodedTokens | None = None


class Captioner(PreTrainedModel, GenerationMixin):
    """`VisionGPT2Model` as `captioner`, for captions: `AutoModelForImageTextToText` loads it."""

    config_class = CaptionerConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _is_stateful = True  # the cache cannot be cut: no assisted generation
    _supports_sdpa = True  # it calls scaled_dot_product_attention itself

    def __init__(self, config, folder=None, captioner=None):
        """`captioner`: the loaded model of the shared `folder`; without it, one with random weights is built."""
        super().__init__(config)
        self.folder = folder or shared_folder(config.name_or_path, {})
        if captioner is None:
            script = load_source(self.folder)
            constants = config.model_config | {"preprocessing": config.preprocessing, "start_from": ""}
            captioner = script.VisionGPT2Model(SimpleNamespace(**constants), encoder_weights="stored")
        self.captioner = captioner
        self.post_init()

    @classmethod
    def from_pretrained(cls, name_or_path, *args, config=None, dtype=None, device_map=None, **options):
        """A shared folder or Hub id -> the captioner in eval mode.

        The project loads it, strictly, and not transformers: that would leave the tables of an encoder which are not
        among the weights (relative positions, rotary embeddings) without values.

        dtype: of the weights, None and "auto" for the stored one. device_map: None, "auto" or one device.
        """
        if options.get("quantization_config") is not None:
            raise ValueError("quantization_config: a captioner is not quantized while it is loaded")
        folder = shared_folder(name_or_path, options)
        script = load_source(folder)
        if config is None:
            config = cls.config_class.from_pretrained(folder)
        model = cls(config, folder, script.VisionGPT2Model.from_pretrained(folder))
        model.name_or_path = str(name_or_path)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        dtype = options.get("torch_dtype") if dtype is None else dtype
        if dtype not in (None, "auto"):
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if isinstance(device_map, dict):
            if device_map.keys() != {""}:
                raise ValueError(f"device_map {device_map}: a captioner is on one device as a whole")
            device_map = device_map[""]
        if device_map is not None:
            model.to(script.DEVICE if device_map == "auto" else device_map)
        return model.eval()

    def save_pretrained(self, save_directory, **options):
        """Write what `from_pretrained` reads: weights, configs and source code. The processor saves the tokenizer.

        Raises ValueError for `push_to_hub`: the project's export_to_hub.py does that, with a model card.
        """
        if options.get("push_to_hub"):
            raise ValueError("push_to_hub: share a captioner with the project's export_to_hub.py")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        weights = {name: tensor.contiguous() for name, tensor in self.captioner.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        copy_source(self.folder, folder)

    def _init_weights(self, module):
        """The project's constructors have done that."""

    def get_input_embeddings(self):
        return self.captioner.gpt.tok_emb

    def forward(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        image_states=None,
        decoded=None,
        use_cache=None,
        return_dict=True,
        **unused,
    ):
        """Photos and the captions so far -> `CaptionerOutput`.

        input_ids (B * K, T), those that `decoded` does not hold yet: the K captions of an image in adjacent rows;
        pixel_values (B, 3, H, W), normalised; attention_mask (B * K, tokens so far), 0 for padding, which has to be on
        the left; image_states: instead of pixel_values, the result of `VisionGPT2Model.encoder_states`.
        """
        input_ids = input_ids.to(self.device)
        if decoded is None:
            if image_states is None:
                image_states = self.encode(pixel_values)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
            if (mask.diff() < 0).any():
                raise ValueError("padding of prompts has to be on the left: the caption follows on the right")
            decoded = DecodedTokens(self.captioner, image_states, padding=(mask == 0).sum(1))
        next_token_logits = import_module("captioning.decoding.cached_decoder").next_token_logits
        logits = next_token_logits(self.captioner, decoded.append(input_ids))  # (B * K, T, vocab_size)
        output = CaptionerOutput(logits, decoded if use_cache else None)
        return output if return_dict else output.to_tuple()

    def encode(self, pixel_values):
        """pixel_values (B, 3, H, W) -> what each decoder block attends to. Raises ValueError where there is none."""
        if pixel_values is None:
            raise ValueError("a captioner needs a photo: pixel_values, which its processor makes of images")
        return self.captioner.encoder_states(pixel_values.to(self.device, self.dtype))

    @torch.no_grad()
    def generate(self, inputs=None, *args, pixel_values=None, **options):
        """As `transformers.GenerationMixin.generate`; each photo is encoded once, for all of its beams and draws.

        pixel_values (B, 3, H, W); inputs or input_ids (B, T), by default [BOS] for each photo. A caption ends at the
        decoder's seq_len at the latest.
        """
        if options.get("image_states") is None:
            options["image_states"] = self.encode(pixel_values)
        if inputs is None and options.get("input_ids") is None:
            bos, B = self.generation_config.bos_token_id, len(options["image_states"][0])
            inputs = torch.full((B, 1), bos, device=self.device)
            options["attention_mask"] = torch.ones_like(inputs)
        return super().generate(inputs, *args, **options)

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, image_states=None, use_cache=None, **kwargs
    ):
        decoded = kwargs.get(CACHE)
        return {
            "input_ids": input_ids[:, decoded.length :] if decoded else input_ids,
            "attention_mask": attention_mask,
            "image_states": image_states,
            "decoded": decoded,
            "use_cache": use_cache,
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return model_kwargs | ({CACHE: outputs.decoded} if outputs.decoded else {})

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # `forward` makes its own

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        generation_config.max_length = min(generation_config.max_length, self.config.max_position_embeddings)
        return generation_config


class CaptionProcessor(ProcessorMixin):
    """Photos to `pixel_values`, prompts to `input_ids` that begin with BOS, ids to text."""

    def __init__(self, tokenizer, preprocessing=None):
        """`preprocessing`: img_size, mean, std, resample."""
        super().__init__(tokenizer)
        self.preprocessing = preprocessing

    @classmethod
    def from_pretrained(cls, name_or_path, **options):
        folder = shared_folder(name_or_path, options)
        load_source(folder)
        processor = super().from_pretrained(name_or_path, **options)
        processor.folder = folder
        return processor

    def save_pretrained(self, save_directory, **options):
        files = super().save_pretrained(save_directory, **options)
        copy_source(self.folder, save_directory)
        return files

    def __call__(self, images=None, text=None, return_tensors="pt", **unused):
        """-> BatchFeature with pixel_values (B, 3, H, W), input_ids and attention_mask (B, T), padded on the left.

        images: one or a list of what the project's `load_image` takes: paths, PIL images, arrays (H, W, 3) uint8.
        text: a prompt for each photo, or one for all; none is "". Raises ValueError where their numbers differ.
        """
        if images is None:
            raise ValueError("a captioner needs a photo: give images")
        images = images if isinstance(images, (list, tuple)) else [images]
        texts = text if isinstance(text, (list, tuple)) else [text or ""] * len(images)
        if len(texts) != len(images):
            raise ValueError(f"{len(texts)} texts for {len(images)} images")
        preprocess = import_module("captioning.images.preprocessing").preprocess
        pixels = [preprocess(image, **self.preprocessing) for image in images]
        rows = [self.prompt_ids(text) for text in texts]
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        return BatchFeature(
            {
                "pixel_values": torch.stack(pixels),
                "input_ids": torch.tensor([[pad] * n + row for n, row in zip(padding, rows, strict=True)]),
                "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
            }
        )

    def prompt_ids(self, text):
        """As the project's `encode_prompt`: [BOS] text; special tokens that are spelled out in it are text."""
        ids = self.tokenizer.encode(text.strip(), add_special_tokens=False, split_special_tokens=True)
        return [self.tokenizer.bos_token_id, *ids][: self.tokenizer.model_max_length - 2]

    def post_process_image_text_to_text(self, generated_outputs, **options):
        """Ids (B, T) -> list of captions, without the spaces around them, as the project writes them."""
        return [caption.strip() for caption in super().post_process_image_text_to_text(generated_outputs, **options)]
