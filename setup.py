"""densekd: knowledge distillation for dense object detectors."""
from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="densekd",
    version="0.1.0",
    description="Knowledge distillation for dense object detectors (RetinaNet, GFL, ATSS, FCOS) in plain PyTorch",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["kd", "kd.*", "models", "models.*", "losses", "data", "data.*"]),
    package_data={package: ["py.typed"] for package in ("kd", "models", "losses", "data")} | {
        "kd.experiments.report": ["*.html", "*.css"]},
    install_requires=["torch>=2.7", "torchvision>=0.22", "pycocotools>=2.0.7", "numpy>=1.26", "pyyaml>=6", "tqdm>=4"],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff", "faster-coco-eval>=1.8", "av", "matplotlib",
                 "tensorboard", "onnx", "onnxscript", "onnxruntime", "timm>=1.0", "simplejpeg>=1.8",
                 "safetensors>=0.4"],
        "eval": ["faster-coco-eval>=1.8"],  # COCO figures ten times as fast
        "viz": ["matplotlib", "tensorboard"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "openvino": ["openvino>=2024.0"],  # 60 MB to download; its tests are skipped without it
        "video": ["av"],
        "jpeg": ["simplejpeg>=1.8"],  # decodes JPEG faster than Pillow, to the same pixels
        "timm": ["timm>=1.0"],  # its models as backbones
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.14", "sqlalchemy>=2", "alembic>=1.10"],  # with its default store, a database file
        "search": ["optuna>=4"],  # engine: optuna of sweep.py --search
        "hub": ["safetensors>=0.4"],  # .safetensors files
        "browser": ["playwright>=1.50"],  # 50 MB; tests open the report in an installed Chromium, and skip without it
    },
)
