"""``python benchmarks/small_images.py SIZE SCRIPT [ARGUMENTS]``: a script of solo-learn that evaluates small images.

solo-learn resizes folders of images (``data.dataset=custom``) to 224 pixels for evaluation, in a function which it
tells its users to rewrite: ``build_custom_pipeline``. This does so, at run time. Run in a clone of solo-learn; not with
``-m``, because this repository's root must not hide the installed package.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from torchvision import transforms as T


def main(size: int, script: Path, arguments: list[str]) -> None:
    """Run ``script`` as Python would, with an evaluation pipeline of ``size`` pixels."""
    sys.path[0] = str(script.resolve().parent)
    sys.argv = [str(script), *arguments]
    from solo.data import classification_dataloader

    finish = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    pipeline = {
        "T_train": T.Compose([T.RandomResizedCrop(size, scale=(0.3, 1.0)), *finish]),
        "T_val": T.Compose([T.Resize((size, size)), *finish]),
    }
    classification_dataloader.build_custom_pipeline = lambda: pipeline
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
