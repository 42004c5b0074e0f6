"""Looking at what came out: class probabilities and picture grids."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..latent_guidance.errors import UserError
from .ranges import check_ranges
from .runtime import current

CATEGORY = "latent guidance/evaluation"

GRID_INPUTS = 8


class LGClassProbabilities:
    """Class Probabilities."""

    DISPLAY_NAME = "Class Probabilities"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Asks a noisy-latent classifier what it sees in finished latents or pictures, and draws its answer as a bar chart: one chart "
        "per picture. It is the guide's own opinion: guided pictures please it by construction."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["classify", "probe", "probabilities", "bar chart", "labels"]
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("chart", "table")
    OUTPUT_TOOLTIPS = (
        "A bar chart for each picture.",
        "The probabilities as text: one line per label, one column per picture.",
    )
    FUNCTION = "probe"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "类别概率",
        "description": (
            "询问带噪潜变量分类器在生成的潜变量或图片中看到了什么，并画成柱状图：每张图片一张图。"
            "这是引导者自己的判断，被引导的图片自然会令它满意。"
        ),
        "inputs": {
            "classifier": ("分类器", "要询问的分类器。"),
            "latent": ("潜变量", "要判断的潜变量；或者连接 image 和 vae。"),
            "image": ("图片", "要判断的图片，先由 vae 编码；仅在未连接 latent 时使用。"),
            "vae": ("VAE", "用于编码图片的 VAE，须为分类器训练所用的 VAE。"),
        },
        "outputs": (
            ("图表", "每张图片一幅柱状图。"),
            ("表格", "概率的文字形式：每个标签一行，每张图片一列。"),
        ),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"classifier": ("LG_CLASSIFIER", {"tooltip": "The classifier to ask."})},
            "optional": {
                "latent": ("LATENT", {"tooltip": "The latents to judge; or connect image and vae."}),
                "image": (
                    "IMAGE",
                    {"tooltip": "The pictures to judge, encoded by vae; used if latent is not connected."},
                ),
                "vae": (
                    "VAE",
                    {"tooltip": "The VAE that encodes the pictures: the one that the classifier was trained on."},
                ),
            },
        }

    def probe(self, classifier: Any, latent: Any = None, image: Any = None, vae: Any = None) -> tuple[Tensor, str]:
        from ..latent_guidance.evaluation.pictures import bar_chart
        from ..latent_guidance.evaluation.probe import class_probabilities

        samples = self._samples(latent, image, vae)
        probabilities, labels = class_probabilities(classifier, samples).cpu(), list(classifier.config.labels)
        columns = [[f"{value:.4f}" for value in row] for row in probabilities.T.tolist()]
        table = "\n".join("\t".join([label, *column]) for label, column in zip(labels, columns, strict=True))
        if classifier.config.head == "regression":
            # a score has no range of its own: the bar is only a hint, title and table hold the number
            shown = probabilities.sigmoid().tolist()
            titles = [f"{labels[0]}: {value:.3f}" for value in probabilities[:, 0].tolist()]
        else:
            shown = probabilities.tolist()
            titles = [_title(labels, row) for row in shown]
        charts = [bar_chart(labels, row, title=title) for row, title in zip(shown, titles, strict=True)]
        return torch.stack(charts), table

    def _samples(self, latent: Any, image: Any, vae: Any) -> Tensor:
        if latent is not None:
            return latent["samples"]
        if image is None or vae is None:
            raise UserError(
                "Class Probabilities with neither a latent nor a picture and a VAE",
                expected="a latent, or a picture and the VAE to encode it",
                mend="connect latent, or connect image and vae (Load Checkpoint Folder)",
            )
        return current().encode_image(vae, image, sample=False, seed=0)


def _title(labels: list[str], probabilities: list[float]) -> str:
    best = max(range(len(labels)), key=probabilities.__getitem__)
    return f"{labels[best]}: {probabilities[best]:.0%}".replace("%", " %")


class LGPictureGrid:
    """Picture Grid."""

    DISPLAY_NAME = "Picture Grid"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Puts pictures into one labelled sheet, to compare settings. With one input every picture is a cell; with several, each input "
        "is a cell and its pictures stand below one another."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["grid", "contact sheet", "compare", "xy plot", "labels"]
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The sheet, as one picture.",)
    FUNCTION = "draw"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "图片网格",
        "description": (
            "把图片排成一张带标签的大图，便于比较不同设置。只连接一个输入时每张图片为一格；"
            "连接多个输入时每个输入为一格，其图片上下排列。"
        ),
        "inputs": {
            "images": ("图片", "第一组图片。"),
            "labels": ("标签", "各格的标题，每行一个，按顺序；可以少于格数，留空则没有标题（中性值）。"),
            "columns": ("列数", "并排多少格；0 表示自动，使大图接近正方形（中性值）。范围：0 到 64。"),
            "gap": ("间距", "图片之间的像素数。范围：0 到 256。"),
            **{f"images_{i}": (f"图片 {i}", f"第 {i} 组图片，可选。") for i in range(2, GRID_INPUTS + 1)},
        },
        "outputs": (("大图", "拼成的一张大图。"),),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The first pictures."}),
                "labels": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Captions of the cells in order, one a line; there may be fewer than cells. Neutral: empty.",
                    },
                ),
                "columns": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 64,
                        "step": 1,
                        "tooltip": "Cells side by side; 0 chooses so that the sheet is about square. Neutral: 0. Range: 0 to 64.",
                    },
                ),
                "gap": (
                    "INT",
                    {
                        "default": 8,
                        "min": 0,
                        "max": 256,
                        "step": 1,
                        "tooltip": "Pixels between pictures. Range: 0 to 256.",
                    },
                ),
            },
            "optional": {
                f"images_{i}": ("IMAGE", {"tooltip": f"Pictures of cell {i}. Optional."})
                for i in range(2, GRID_INPUTS + 1)
            },
        }

    def draw(self, images: Tensor, labels: str, columns: int, gap: int, **more: Tensor | None) -> tuple[Tensor]:
        from ..latent_guidance.evaluation.pictures import picture_grid

        check_ranges(self, columns=columns, gap=gap)
        groups = [images, *(group for _, group in sorted(more.items()) if group is not None)]
        cells = list(images.split(1)) if len(groups) == 1 else groups
        return (picture_grid(cells, _lines(labels), columns=columns, gap=gap),)


def _lines(labels: str) -> list[str]:
    return labels.rstrip().splitlines() if labels.strip() else []


class LGGuidanceReport:
    """Guidance Report."""

    DISPLAY_NAME = "Guidance Report"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "What guided a run, step by step: noise level, guidance scale in force, the size of the difference between prompt and negative, "
        "what each rule changed, the classifier's probability of the target, and the network passes paid for; drawn, and as a table in "
        "JSON. Switch 'report' on in Guider or in Apply Guidance to Model, and connect the latent that its sampler answers: by it "
        "the run is found, even if the sampler did not have to run again."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["report", "plot", "guidance scale", "debug guidance", "norms", "passes"]
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("plot", "table")
    OUTPUT_TOOLTIPS = (
        "The report as curves over the noise level, noisy on the left; a band spans the pictures of a batch.",
        "The report as JSON: a row for every call of the guider, a number for every picture.",
    )
    FUNCTION = "report"
    ZH: ClassVar[dict[str, Any]] = {
        "display_name": "引导报告",
        "description": (
            "逐步显示一次采样如何被引导：噪声水平、当前引导强度、正向与反向估计之差的大小、每条规则改变了多少、"
            "分类器给出的目标概率，以及所用的网络调用次数；既画成曲线，也给出 JSON 表格。"
            "请在“引导器”或“将引导应用于模型”中打开 report，并连接采样器输出的潜变量：即使采样器未重新运行，也能据此找到对应的那次采样。"
        ),
        "inputs": {"latent": ("潜变量", "采样器的 output 输出，未经其他节点修改；不是 denoised_output。")},
        "outputs": (
            ("曲线图", "沿噪声水平画成曲线的报告，左端噪声最大；色带表示同一批各图片的范围。"),
            ("表格", "JSON 形式的报告：引导器每次调用一行，每张图片一个数。"),
        ),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": (
                    "LATENT",
                    {"tooltip": "The sampler's output as it is: not denoised_output, and not changed by another node."},
                )
            }
        }

    def report(self, latent: Any) -> tuple[Tensor, str]:
        from ..latent_guidance.evaluation.guidance_plot import report_image
        from ..latent_guidance.guidance.report import REPORTS

        found = REPORTS.find(latent["samples"])
        return report_image(found), found.to_json()


NODES: dict[str, type] = {
    "LGClassProbabilities": LGClassProbabilities,
    "LGPictureGrid": LGPictureGrid,
    "LGGuidanceReport": LGGuidanceReport,
}
