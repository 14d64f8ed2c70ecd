"""Take the pictures of the doctor's page for the gallery: its upper part, and its heat map.

    python docs/update_gallery.py

A small network is trained on the digits with a momentum that is far too small, and examined with
its checkpoints.
"""

import runpy
import shutil
import tempfile
from pathlib import Path

import torch
from selenium import webdriver
from torch import nn

import normkit as nk
from normkit.doctor import Diagnosis
from normkit.lab.data import load
from normkit.lab.models import build_model
from normkit.lab.report import write_diagnosis

DOCS = Path(__file__).parent
IMAGES, WIDTH, HEIGHT = DOCS / "images", 1040, 1250
COMMAND = (
    "normkit diagnose --model small-resnet --checkpoint weights.safetensors"
    " --train-data digits --test-data digits --try"
)


def main() -> None:
    """Rewrite the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        report = write_diagnosis(Path(folder), diagnosis(), "small-resnet on digits", COMMAND)
        take_picture = runpy.run_path(str(DOCS / "update_compare.py"))["take_picture"]
        take_picture(report, IMAGES / "doctor-report.png", WIDTH, HEIGHT)
        take_picture_of(report, ".heat", IMAGES / "esm-heat-map.png")


def diagnosis() -> Diagnosis:
    """Train and examine the network."""
    torch.manual_seed(0)
    data = load("digits")
    model = build_model("small-resnet", num_classes=10, input_shape=data.input_shape).model
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.001
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    checkpoints = {}
    for epoch in range(6):
        for index in torch.randperm(len(data.train)).split(32):
            batch = data.train.take(index)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
        checkpoints[f"epoch {epoch + 1}"] = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoints.popitem()  # the last one is the model itself
    train, test = (
        list(zip(part.inputs.split(32), part.targets.split(32), strict=True))
        for part in (data.train, data.test)
    )
    return nk.diagnose(model, train, test, checkpoints=checkpoints, try_fixes=True)


def take_picture_of(report: Path, selector: str, path: Path) -> None:
    """Picture the figure around one element of a report."""
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium") or ""
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        browser.set_window_size(WIDTH, HEIGHT)
        browser.get(report.resolve().as_uri())
        browser.find_element("css selector", selector).screenshot(str(path))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
