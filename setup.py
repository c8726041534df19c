import re
from pathlib import Path

from setuptools import find_packages, setup


here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "hf_esm" / "version.py").read_text()).group(1)

setup(
    name="hf_esm",
    version=version,
    description="Merge fine-tunes of one checkpoint into one multi-task model, for transformers, peft and accelerate",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["model merging", "transformers", "peft", "mixture of experts", "LoRA"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["hf_esm", "hf_esm.*"]), "hf_esm.model_cards"],
    package_dir={"hf_esm": "hf_esm", "hf_esm.model_cards": "model_cards"},
    package_data={"hf_esm": ["py.typed"], "hf_esm.model_cards": ["*.md", "*.html"]},
    install_requires=[
        "torch>=2.9.1",
        "transformers>=5.23",
        "peft>=0.21",
        "accelerate>=1.15",
        "safetensors>=0.8",
        "datasets>=5.2",
        "filelock>=3.20.3",
        "huggingface_hub>=2.4",
        "jinja2>=3.1",
        "pandas",
        "psutil",
        "pyyaml",
        "scipy>=1.13",
    ],
    extras_require={
        "demo": ["matplotlib", "pillow", "scikit-learn"],
        "test": [
            "matplotlib",
            "pillow",
            "pytest",
            "pytest-xdist",
            "scikit-learn",
            "sentence-transformers>=6.2",
            "setuptools>=77",
        ],
        "embedding": ["sentence-transformers>=6.2"],
        "quantised": ["bitsandbytes>=0.46.1", "compressed-tensors>=0.15"],
        "lm-eval": ["lm-eval>=0.4.9"],
        "search": ["optuna>=4", "scikit-learn"],
        "space": ["gradio>=6"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
        "extras": ["evaluate", "ipykernel", "nbclient", "onnx", "onnxruntime", "onnxscript"],
        "quality": ["pytest", "ruff", "ty", "typos"],
    },
    entry_points={"console_scripts": ["hf-esm=hf_esm.cli:main"]},
)
