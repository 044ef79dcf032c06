"""A captioner with a confidence that nobody had to fit."""

import shutil

import torch

from captioning.decoding.confidence import Calibration, Confidence
from MyLLM_Vit_gpt2_captioning import load_captioner


def known_of(model):
    """A `Confidence` that trusts the log-odds with the photo."""
    no_photo = torch.zeros(model.config.depth, model.config.embed_dim)
    about = {"images": 10, "captions right": 0.5, "meaning": "none"}
    return Confidence(no_photo, {"": 2.0}, Calibration([0.5, 0.1, 0.1], 0.1), Calibration([1.0, 0.1, 0.1], 0.1), about)


def calibrated_copy(source, folder):
    """A copy of the captioner in `source`, calibrated -> its folder."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.png"))
    known_of(load_captioner(folder)[0]).save(folder)
    return folder
