"""A run's report: what is in a row is what happened, samples and runs are kept apart, and keeping none costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    ClassifierGuidance,
    ClassifierMeanShift,
    ClassifierPostStep,
    Guider,
    LimitedInterval,
    MomentumGuidance,
    RescaleGuidance,
    TangentialCFG,
    TwoConditions,
    record,
)
from latent_guidance.guidance.record import HOST, Record
from latent_guidance.guidance.report import Report, Reports
from latent_guidance.guidance.run import GuidanceRun
from latent_guidance.guidance.steps import sampler_options
from latent_guidance.process import VE_SCALED
from latent_guidance.samplers import Recurrence, sample_ddpm, sample_euler, sample_heun

from .conftest import SmallClassifier, latents
from .test_run import Recorder, cond_of

SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
COND, UNCOND = 2.0, 0.5
CFG_NAME = "Classifier-Free Guidance (CFG)"


def size(x: Tensor) -> list[float]:
    return [float(f"{(sample**2).mean() ** 0.5:.6g}") for sample in x]


def reported(rules: list, *, x: Tensor | None = None, sigma: float = 2.0) -> dict:
    """The row of one call on a denoiser that answers cond * x."""
    x = latents() if x is None else x
    guider = Guider(Recorder(), rules, uncond=cond_of(UNCOND), report=True)
    guider(x, torch.full((len(x),), sigma, dtype=x.dtype), cond_of(COND))
    [row] = guider.report.chains[0].rows
    return row


def test_a_row_says_what_each_stage_changed(classifier: SmallClassifier) -> None:
    x, w = latents(), 4.0
    rules = [
        CFG(guidance_scale=w),
        RescaleGuidance(),
        ClassifierGuidance(scaling="raw", classifier=classifier, label="cat"),
    ]
    row = reported(rules)
    sigma = torch.full((3,), 2.0, dtype=torch.float64)
    outs = [Guider(Recorder(), rules[:n], uncond=cond_of(UNCOND))(x, sigma, cond_of(COND)) for n in range(4)]
    assert row["delta"] == size((COND - UNCOND) * x)
    assert row["contributions"] == {
        CFG_NAME: size((w - 1) * (COND - UNCOND) * x),
        "Rescale Guidance": size(outs[2] - outs[1]),
        "Classifier Guidance": size(outs[3] - outs[2]),
    }
    assert all(min(sizes) > 1e-3 for sizes in row["contributions"].values())
    assert row["denoised"] == size(outs[3])
    assert row["guidance_scale"] == [w] * 3 and row["sigma"] == [2.0] * 3
    assert row["branches"] == ["positive", "negative"] and row["passes"] == 2


def test_scale_and_branch_rules_are_measured_through_plain_cfg() -> None:
    x = latents()
    run_of = {"cond": torch.tanh(x), "uncond": torch.sin(2 * x) / 2}
    kept = Record()
    rules = [CFG(guidance_scale=4.0), TangentialCFG(damping=1.0), LimitedInterval(sigma_lo=3.0, sigma_hi=9.0)]
    run = GuidanceRun(rules, VE_SCALED, record=kept)
    sigma = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)  # the first is outside of the window
    out = run(x, sigma, lambda names: run_of)
    plain = GuidanceRun([rules[0], rules[2]], VE_SCALED)(x, sigma, lambda names: run_of)
    [row] = Report.of(kept).chains[0].rows
    assert row["guidance_scale"] == [1.0, 4.0, 4.0]
    assert row["contributions"][TangentialCFG.node.name] == pytest.approx(size(out - plain), rel=1e-5)
    changed = TangentialCFG(damping=1.0).apply(run_at(x, sigma, run_of))
    outer = 3 * ({**run_of, **changed}["cond"] - {**run_of, **changed}["uncond"])
    assert row["contributions"]["Limited Interval"] == pytest.approx([size(outer)[0], 0.0, 0.0], rel=1e-5)


def run_at(x: Tensor, sigma: Tensor, estimates: dict[str, Tensor]):  # noqa: ANN201
    from latent_guidance.guidance import Step

    return Step(VE_SCALED, x, sigma, None, torch.full_like(sigma, 4.0), estimates)


def test_what_a_saved_pass_would_have_said_is_not_made_up() -> None:
    row = reported([CFG(guidance_scale=4.0), LimitedInterval(sigma_lo=0.1, sigma_hi=1.0)])
    assert row["delta"] is None and row["branches"] == ["positive"] and row["passes"] == 1
    assert row["contributions"] == {CFG_NAME: [0.0] * 3, "Limited Interval": [None] * 3}


def test_further_branches_are_named_by_their_rule() -> None:
    row = reported([TwoConditions(condition=cond_of(0.9))])
    assert row["branches"] == ["positive", "negative", "of Two-Condition Guidance"] and row["passes"] == 3


def test_a_hosts_own_combination_is_a_contribution_too() -> None:
    kept, x = Record(), latents()
    run = GuidanceRun([], VE_SCALED, base_scale=3.0, record=kept)
    run(x, torch.ones(3, dtype=torch.float64), lambda names: {"cond": 2 * x, "uncond": x})
    assert Report.of(kept).chains[0].rows[0]["contributions"] == {HOST: size(2 * x)}


def test_the_probability_is_the_targets_by_the_one_call_that_the_rule_made(classifier: SmallClassifier) -> None:
    x = latents()
    rule = ClassifierGuidance(scaling="raw", classifier=classifier, label="dog", sigma_hi=5.0)
    row = reported([rule], x=x)
    [(u, log_snr)] = classifier.calls
    with torch.no_grad():
        expected = classifier.logits(u, log_snr).softmax(dim=1)[:, 1]
    assert row["notes"]["Classifier Guidance"]["probability"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert min(expected) > 0 and max(expected) < 1
    assert reported([rule], sigma=6.0)["notes"] == {}, "outside of its window the classifier is not called"


def test_a_sample_outside_the_window_has_no_probability(classifier: SmallClassifier) -> None:
    guider = Guider(
        Recorder(), [ClassifierGuidance(scaling="raw", classifier=classifier, label="dog", sigma_hi=5.0)], report=True
    )
    guider(latents(), torch.tensor([8.0, 2.0, 8.0], dtype=torch.float64), cond_of(COND))
    found = guider.report.chains[0].rows[0]["notes"]["Classifier Guidance"]["probability"]
    assert found[0] is None and found[2] is None and 0 < found[1] < 1


def test_a_regression_head_notes_its_score(classifier: SmallClassifier) -> None:
    scorer = classifier.with_config(head="regression", labels=("beauty",))
    row = reported([ClassifierGuidance(scaling="raw", classifier=scorer, label="down")])
    with torch.no_grad():
        assert row["notes"]["Classifier Guidance"]["score"] == pytest.approx(
            scorer.logits(*scorer.calls[0])[:, 0].tolist(), rel=1e-5
        )


SHIFT, POST = "Classifier Mean Shift (DDPM)", "Classifier Post-Step (DDPM)"


def in_steps(rules: list, x: Tensor, **more: object) -> list[dict]:
    """The rows of rules inside the steps of DDPM, by a denoiser that answers COND * x."""
    kept = Record("sampler")
    options = sampler_options(rules, VE_SCALED, SIGMAS, kept)
    sample_ddpm(
        Recorder(), x, SIGMAS, cond=cond_of(COND), noise_sampler=lambda *_: torch.zeros_like(x), **options, **more
    )
    [chain] = Report.of(kept).chains
    assert chain.on == "sampler" and chain.passes is None
    return list(chain.rows)


def test_a_rule_inside_the_steps_is_measured_by_what_its_gradient_would_add_to_the_estimate(
    classifier: SmallClassifier,
) -> None:
    x, same = 8 * latents(), {"classifier": classifier, "label": "dog", "guidance_scale": 3.0}
    rows = in_steps([ClassifierMeanShift(**same)], x)
    # the same gradient at the same x, in a guider
    of_guider = reported([ClassifierGuidance(scaling="raw", **same)], x=x, sigma=8.0)
    assert rows[0]["contributions"][SHIFT] == pytest.approx(of_guider["contributions"]["Classifier Guidance"], rel=1e-5)
    assert rows[0]["notes"][SHIFT] == of_guider["notes"]["Classifier Guidance"]
    assert [row["sigma"][0] for row in rows] == SIGMAS[:-1].tolist() and [row["step"] for row in rows] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert rows[0]["guidance_scale"] == [None] * 3 and rows[0]["delta"] is rows[0]["denoised"] is None


def test_a_rule_after_the_step_is_reported_at_the_level_it_is_at(classifier: SmallClassifier) -> None:
    x, same = 8 * latents(), {"classifier": classifier, "label": "dog"}
    rows = in_steps([ClassifierPostStep(**same)], x)
    assert [row["sigma"][0] for row in rows] == SIGMAS[1:-1].tolist(), "at sigma 0 it is not asked"
    assert all(0 < p < 1 for row in rows for p in row["notes"][POST]["probability"])
    both = in_steps(
        [ClassifierMeanShift(**same), ClassifierMeanShift(**same | {"label": "cat"}), ClassifierPostStep(**same)], x
    )
    assert [set(row["contributions"]) for row in both] == [{SHIFT, f"{SHIFT} 2"}] + [{SHIFT, f"{SHIFT} 2", POST}] * 4


def test_every_turn_of_a_recurrence_has_a_row(classifier: SmallClassifier) -> None:
    rule = ClassifierMeanShift(classifier=classifier, label="dog")
    rows = in_steps([rule], 8 * latents(), recurrence=Recurrence(times=2))
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_report_of_steps_leaves_the_pictures_as_they_are(classifier: SmallClassifier) -> None:
    x, rule = 8 * latents(), ClassifierMeanShift(classifier=classifier, label="dog", guidance_scale=5.0)

    def picture(kept: Record | None) -> Tensor:
        options = sampler_options([rule], VE_SCALED, SIGMAS, kept)
        return sample_ddpm(
            Recorder(), x, SIGMAS, cond=cond_of(COND), noise_sampler=lambda *_: torch.zeros_like(x), **options
        )

    assert torch.equal(picture(None), picture(Record("sampler")))


def test_two_rules_of_a_kind_have_rows_of_their_own(classifier: SmallClassifier) -> None:
    cat, dog = (ClassifierGuidance(scaling="raw", classifier=classifier, label=label) for label in ("cat", "dog"))
    row = reported([cat, dog])
    names = ["Classifier Guidance", "Classifier Guidance 2"]
    assert list(row["contributions"]) == [HOST, *names] or list(row["contributions"]) == [*names, HOST]
    assert list(row["notes"]) == names
    for name, rule in zip(names, (cat, dog), strict=True):
        assert row["notes"][name] == reported([rule])["notes"]["Classifier Guidance"]


@pytest.mark.parametrize(
    ("sampler", "calls"), [(sample_euler, [0, 1, 2, 3, 4]), (sample_heun, [0, 1, 1, 2, 2, 3, 3, 4, 4])]
)
def test_one_row_for_every_call(sampler, calls: list[int]) -> None:  # noqa: ANN001
    model = Recorder()
    guider = Guider(model, [CFG(guidance_scale=3.0)], uncond=cond_of(UNCOND), report=True)
    sampler(guider, 8 * latents(), SIGMAS, cond=cond_of(COND))
    rows = guider.report.chains[0].rows
    assert [row["step"] for row in rows] == calls and [row["call"] for row in rows] == list(range(len(calls)))
    assert guider.report.chains[0].passes == sum(model.batches) // 3 == 2 * len(calls)


def test_two_runs_do_not_mix_and_equal_runs_have_equal_reports() -> None:
    rules = [CFG(guidance_scale=3.0), MomentumGuidance()]
    guider = Guider(Recorder(), rules, uncond=cond_of(UNCOND), report=True)
    texts = []
    for factor in (8, 8, 4):
        sample_euler(guider, factor * latents(), SIGMAS, cond=cond_of(COND))
        texts.append(guider.report.to_json())
        assert len(guider.report.chains[0].rows) == 5
    assert texts[0] == texts[1] != texts[2]


def test_each_sample_is_reported_as_if_it_were_alone(classifier: SmallClassifier) -> None:
    rules = [
        CFG(guidance_scale=3.0),
        RescaleGuidance(),
        ClassifierGuidance(scaling="raw", classifier=classifier, label="cat"),
    ]
    together = reported(rules)
    for i in range(3):
        alone = reported(rules, x=latents()[i : i + 1])
        assert alone["delta"] == together["delta"][i : i + 1] and alone["denoised"] == together["denoised"][i : i + 1]
        assert alone["contributions"] == {name: found[i : i + 1] for name, found in together["contributions"].items()}


def test_the_pictures_are_the_same_and_without_a_report_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rules, measured = [CFG(guidance_scale=3.0), RescaleGuidance()], []
    own = record.root_mean_square
    monkeypatch.setattr(record, "root_mean_square", lambda x: measured.append(1) or own(x))
    outs = []
    for report in (False, True):
        guider = Guider(Recorder(), rules, uncond=cond_of(UNCOND), report=report)
        outs.append(sample_euler(guider, 8 * latents(), SIGMAS, cond=cond_of(COND)))
        assert bool(measured) is report
    assert torch.equal(*outs)
    with pytest.raises(UserError, match="report=True"):
        Guider(Recorder(), rules, uncond=cond_of(UNCOND)).report  # noqa: B018


def test_json_and_file(tmp_path: Path) -> None:
    guider = Guider(
        Recorder(), [CFG(guidance_scale=3.0), LimitedInterval(sigma_hi=3.0)], uncond=cond_of(UNCOND), report=True
    )
    sample_euler(guider, 8 * latents(), SIGMAS, cond=cond_of(COND))
    guider.report.write(tmp_path / "sub" / "report.json")
    read = json.loads((tmp_path / "sub" / "report.json").read_text("utf-8"))
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["report.json"]
    [chain] = read["chains"]
    assert "root mean square" in read["unit"] and chain["rules"] == [CFG_NAME, "Limited Interval"]
    assert chain["passes"] == 8 and tuple(chain["rows"]) == guider.report.chains[0].rows
    assert "NaN" not in guider.report.to_json()


class TestReportsByLatents:
    def recorded(self, name: str) -> Record:
        kept = Record()
        kept.describe([name], {})
        return kept

    def test_the_run_that_ended_in_this_tensor_is_found_even_beside_an_equal_one(self) -> None:
        reports, first, second = Reports(), torch.ones(1, 2), torch.ones(1, 2)
        reports.keep(first, self.recorded("a"))
        reports.keep(second, self.recorded("b"))
        assert reports.find(first).chains[0].rules == ("a",) and reports.find(second).chains[0].rules == ("b",)
        assert reports.find(torch.ones(1, 2)).chains[0].rules == ("b",)
        assert reports.find(first.double()).chains[0].rules == ("b",), "a copy is found by its values"

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
    def test_a_latent_that_the_program_keeps_in_half_precision_is_found(self, kind: torch.dtype) -> None:
        reports, first, second = Reports(), torch.full((1, 2), 1 / 3), torch.full((1, 2), 2 / 3)
        reports.keep(first, self.recorded("a"))
        reports.keep(second, self.recorded("b"))
        assert reports.find(first.to(kind)).chains[0].rules == ("a",)
        with pytest.raises(UserError):  # what was rounded afterwards is another latent
            reports.find(first.to(kind).float())

    def test_numbers_of_a_kept_run_are_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moved: list[int] = []
        plain = Tensor.cpu
        monkeypatch.setattr(Tensor, "cpu", lambda self: moved.append(id(self)) or plain(self))
        record = Record()
        guider = GuidanceRun([CFG(guidance_scale=3.0)], VE_SCALED, record=record)
        x, sigma = latents(), torch.ones(3, dtype=torch.float64)
        guider(x, sigma, lambda names: {name: x * (i + 1) for i, name in enumerate(names)})
        record.calls[0].notes["a rule"] = {"probability": torch.ones(3)}
        [call] = record.calls
        assert call.delta is not None and call.denoised is not None
        kept = [call.sigma, call.guidance_scale, call.delta, call.denoised, call.contributions[CFG_NAME]]
        kept.append(call.notes["a rule"]["probability"])
        Reports().keep(x, record)
        assert {id(value) for value in kept} <= set(moved)

    def test_two_chains_of_one_run_stand_together(self) -> None:
        reports, samples = Reports(), torch.ones(1, 2)
        for name in "ab":
            reports.keep(samples, self.recorded(name))
        assert [chain.rules for chain in reports.find(samples).chains] == [("a",), ("b",)]

    def test_anything_else_is_refused_with_words_and_old_runs_are_let_go(self) -> None:
        reports, samples = Reports(runs=2), [torch.full((1, 2), float(i)) for i in range(3)]
        for each in samples:
            reports.keep(each, self.recorded("a"))
        reports.find(samples[2])
        for wrong in (samples[0], torch.full((2, 1), 2.0), samples[2] + 1e-6, None):
            with pytest.raises(UserError, match=r"Guider.*'report'.*denoised_output"):
                reports.find(wrong)
