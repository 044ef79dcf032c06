"""A bad value on a tool's command line ends in one line that names the option, the value and what is allowed."""

import importlib

import pytest

DECODING = [
    (["--beam", "0"], "--beam must be an integer of at least 1, not 0"),
    (["--beam=-1"], "--beam must be an integer of at least 1, not -1"),
    (["--beam", "two"], "--beam must be an integer of at least 1, not two"),
    (["--top_k", "-1"], "--top_k must be an integer of at least 0, not -1"),
    (["--top_p", "0"], "--top_p must be a number above 0 and at most 1, not 0"),
    (["--top_p", "2"], "--top_p must be a number above 0 and at most 1, not 2"),
    (["--temperature", "0"], "--temperature must be a number above 0, not 0"),
    (["--temperature", "nan"], "--temperature must be a number above 0, not nan"),
    (["--temperature", "inf"], "--temperature must be a number above 0, not inf"),
    (["--length_penalty", "x"], "--length_penalty must be a number, not x"),
    (["--max_words", "-1"], "--max_words must be an integer of at least 0, not -1"),
    (["--max_chars", "many"], "--max_chars must be an integer of at least 0, not many"),
    (["--min_tokens", "-1"], "--min_tokens must be an integer of at least 0, not -1"),
    (["--seed", "-1"], "--seed must be an integer from 0 to 18446744073709551615, not -1"),
    (["--seed", "1.5"], "--seed must be an integer from 0 to 18446744073709551615, not 1.5"),
    (["--precision", "fp8"], "--precision: invalid choice: 'fp8' (choose from "),
    (["--beam", "2", "--sample"], "choose beam search (--beam) or sampling (--sample, "),
    (["--length_penalty", "2"], "--length_penalty is for beam search: give --beam 2 or more"),
    (["--batch_size", "0"], "--batch_size must be an integer of at least 1, not 0"),
    (["--beem", "2"], "unrecognized arguments: --beem"),
]
CAPTION_IMAGE = [
    (["--max_tokens", "-1"], "--max_tokens must be an integer of at least 0, not -1"),
    (["--existing", "keep"], "--existing: invalid choice: 'keep' (choose from "),
    (["--num", "0"], "--num must be an integer of at least 1, not 0"),
    (["--block", "-1"], "--block must be an integer of at least 0, not -1"),
    (["--head", "one"], "--head must be an integer of at least 0, not one"),
    (["--num", "3"], "--num 3: greedy search has one caption an image; give --beam 3 or more, or --sample"),
    (["--num", "3", "--beam", "2"], "--num 3: more captions than --beam 2; give --beam 3 or more, or --sample"),
]
EVALUATE = [
    (["--max_images", "0"], "--max_images must be an integer of at least 1, not 0"),
    (["--split", "dev"], "--split: invalid choice: 'dev' (choose from "),
]
WEB_DEMO = [
    (["--port", "-1"], "--port must be an integer from 0 to 65535, not -1"),
    (["--port", "99999"], "--port must be an integer from 0 to 65535, not 99999"),
    (["--port", "http"], "--port must be an integer from 0 to 65535, not http"),
]
SERVE = [
    (["--beam", "0"], "--beam must be an integer of at least 1, not 0"),
    (["--length_penalty", "2"], "--length_penalty is for beam search: give --beam 2 or more"),
    (["--text", "title"], "--text: invalid choice: 'title' (choose from "),
    (["--max_pixels", "0"], "--max_pixels must be an integer of at least 1, not 0"),
]
PREPARE_DATA = [
    (["--side", "0"], "--side must be an integer of at least 1, not 0"),
    (["--num_workers", "-1"], "--num_workers must be an integer of at least 0, not -1"),
    (["--photos_per_shard", "0"], "--photos_per_shard must be an integer of at least 1, not 0"),
    (["shapes"], "give a dataset (flickr8k, flickr30k, coco2017, shapes), --check FOLDER"),
]
CASES = [
    *(("caption_image", ["photo.jpg", *argv], message) for argv, message in DECODING + CAPTION_IMAGE),
    *(("evaluate_captions", argv, message) for argv, message in DECODING + EVALUATE),
    *(("web_demo", argv, message) for argv, message in WEB_DEMO),
    *(("serve", argv, message) for argv, message in WEB_DEMO + SERVE),
    *(("prepare_data", ["--shrink", "data", *argv], message) for argv, message in PREPARE_DATA),
    ("caption_image", [], "the following arguments are required: IMAGE; --help lists the options"),
    ("convert_captioner", ["source"], "the following arguments are required: target; --help lists the options"),
    ("export_to_hub", ["user/repo", "--license"], "argument --license: expected one argument; --help lists the"),
]


@pytest.mark.parametrize(
    ("tool", "argv", "message"), CASES, ids=[f"{tool} {' '.join(argv)}" for tool, argv, _ in CASES]
)
def test_a_bad_option_is_one_line(tool, argv, message, capsys):
    module = importlib.import_module(tool)
    with pytest.raises(SystemExit) as stop:
        module.main(argv)
    assert isinstance(stop.value.code, str), "nothing but the line is printed, and the exit status is 1"
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert message in stop.value.code
    assert capsys.readouterr() == ("", "")
