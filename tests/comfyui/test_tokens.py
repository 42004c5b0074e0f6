"""Tokens, chunks, weights and encodings equal ComfyUI's, for 500 prompts, in every ComfyUI that is found.

A ComfyUI is looked for in COMFYUI_PATH (several may be given, separated by the system's path separator), in ../ComfyUI and
../ComfyUI-new beside the project, and two folders up. It runs in its own Python: COMFYUI_PYTHON, else its .venv or venv.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_guidance.models.checkpoint import emoji_folder, load_text_encoder
from latent_guidance.models.tiny import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ENCODED = 60
"""That many of the prompts are encoded too."""

THEIR_SIDE = """
import json, sys
comfyui, prompts, tower, result, count = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, comfyui)
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch
from safetensors.torch import load_file, save_file
from comfy.sd1_clip import SDClipModel, SDTokenizer
tokenizer = SDTokenizer(embedding_directory=[result])
tokens = [tokenizer.tokenize_with_weights(prompt) for prompt in json.load(open(prompts, encoding="utf-8"))]
json.dump(tokens, open(result + "/tokens.json", "w"))
tower_model = SDClipModel(textmodel_json_config=tower + "/config.json", dtype=torch.float32, return_projected_pooled=False)
missing, unexpected = tower_model.load_sd({k: v.float() for k, v in load_file(tower + "/model.safetensors").items()})
assert not unexpected and all("text_projection" in name for name in missing), (missing, unexpected)
encoded = {}
with torch.no_grad():
    for number, chunks in enumerate(tokens[: int(count)]):
        encoded[f"tokens.{number}"], encoded[f"pooled.{number}"] = tower_model.encode_token_weights(chunks)
save_file({k: v.contiguous() for k, v in encoded.items()}, result + "/encoded.safetensors")
"""


def comfyuis() -> list[Path]:
    given = [Path(path) for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]
    near = [ROOT.parent / "ComfyUI", ROOT.parent / "ComfyUI-new", ROOT.parent.parent]
    found = [path.resolve() for path in (*given, *near) if (path / "comfy" / "sd1_clip.py").is_file()]
    return list(dict.fromkeys(found))


def python_of(comfyui: Path) -> str:
    inside = [comfyui / name / "bin" / "python" for name in (".venv", "venv")]
    return os.environ.get("COMFYUI_PYTHON") or next((str(path) for path in inside if path.is_file()), sys.executable)


def prompts() -> list[str]:
    """500 prompts: written ones first, then random ones of words and of bracket soup."""
    chosen = random.Random(7)
    text = (
        "red apple flag smiling face cat's don't we're I'm 2024 3.14 blue-green state_of_the_art hello, world! "
        "Ünïcödé naïve Ångström STRASSE straße İstanbul ΣΊΣΥΦΟΣ Привет 你好世界 红苹果 日本語テキスト 한국어 مرحبا שלום नमस्ते "
        "😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ½ ² ① ﬁ … — “quoted” a/b c\\d #tag @name 50% $5 & <b> [x] {y} ~ `z` ^ | = +"
    )
    words = text.split()
    written = [
        "",
        " ",
        "a photo of a cat",
        "(red:1.3) apple",
        "((very)) (big (red:1.5) apple:0.8)",
        r"escaped \(brackets\) and (real \(ones\):1.2)",
        "unbalanced (open",
        "unbalanced close) here",
        ")(",
        "((a)",
        "(a))",
        "(:1.2) (a:) (a:b:1.5) (a:1.5:b)",
        "(a: 1.5) (b:1.5 ) (c:1e-1) (d:-1) (e:nope) (f:1_0)",
        "tabs\tand\nnewlines\r\nand   spaces",
        "non\u00a0breaking\u3000ideographic\u2009thin",
        "e\u0301 decomposed and \u00e9 composed",
        "<|endoftext|> inside",
        "<|startoftext|>inside<|endoftext|>",
        "zero\u200bwidth and bell\u0007 and nul\u0000",
        "a\x1cb \x1d\x1e and \x1f",  # white space to Python alone
        "&amp; &lt;b&gt; html",
        "embedding:missing",
        "a cat, embedding:missing, sharp",
        "a cat embedding:missing,, (red embedding:other:1.2) end",
        "(embedding:missing:1.2) cat",
        "AUTOMATIC1111 BREAK and [alternate|words] and {a|b}",
        "word " * 300,
        "(word:1.1) " * 150,
        "(one two three four five six:1.3), " * 30,
        "超长的中文提示词，" * 60,
        "😀😃😄" * 60,
        "antidisestablishmentarianism" * 12,
        "a" * 500,
        "1234567890" * 20,
        "!" * 120,
        "()" * 40,
    ]
    while len(written) < 400:
        text = ""
        for _ in range(chosen.choice((1, 3, 8, 20, 60, 120))):
            word = chosen.choice(words)
            style = chosen.random()
            if style < 0.10:
                word = f"({word})"
            elif style < 0.20:
                word = f"({word}:{chosen.choice(('0.5', '1.2', '1.35', '2', '0', '-1'))})"
            elif style < 0.25:
                word = f"((({word} {chosen.choice(words)}):1.2) {chosen.choice(words)})"
            text += word + chosen.choice((" ", " ", ", ", ""))
        written.append(text)
    while len(written) < 500:
        written.append("".join(chosen.choice("(()):\\ab 1.5,") for _ in range(chosen.randint(1, 60))))
    return written


@pytest.mark.parametrize("comfyui", comfyuis() or [None], ids=lambda path: "none" if path is None else path.name)
def test_tokens_weights_and_encodings_equal_comfyui(comfyui: Path | None, tmp_path: Path) -> None:
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH")
    checkpoint = emoji_folder() or make_tiny_checkpoint(tmp_path / "tiny")
    texts = prompts()
    assert len(texts) == 500
    (tmp_path / "prompts.json").write_text(json.dumps(texts), encoding="utf-8")
    command = [python_of(comfyui), "-c", THEIR_SIDE, str(comfyui), str(tmp_path / "prompts.json")]
    command += [str(checkpoint / "text_encoder"), str(tmp_path), str(ENCODED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    encoder = load_text_encoder(checkpoint)
    theirs = json.loads((tmp_path / "tokens.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # embeddings that are left out
        ours = [[[list(pair) for pair in chunk] for chunk in encoder.tokenizer.tokenize(text)] for text in texts]
        wrong = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
        assert not wrong, f"{len(wrong)} of 500 differ, such as {wrong[:3]!r}"
        assert sum(len(chunks) > 1 for chunks in ours) > 50
        assert sum(any(w != 1 for chunk in chunks for _, w in chunk) for chunks in ours) > 200

        encoded = load_file(tmp_path / "encoded.safetensors")
        for number, text in enumerate(texts[:ENCODED]):
            tokens, pooled = encoder.encode(text)
            size = float(encoded[f"tokens.{number}"].abs().max())  # what fp32 adds up to goes with it
            torch.testing.assert_close(
                tokens, encoded[f"tokens.{number}"], rtol=1e-4, atol=1e-5 * size, msg=f"{text!r}"
            )
            torch.testing.assert_close(pooled, encoded[f"pooled.{number}"], rtol=1e-4, atol=1e-5, msg=f"{text!r}")
