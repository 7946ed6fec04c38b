"""Package layout; everything else stands in pyproject.toml.

`kernels/` lies at the top of the checkout and installs as `detr_fast.kernels`: a top-level package called `kernels` would
collide with the well-known one that transformers imports when it finds it.
"""

from setuptools import find_packages, setup

setup(
    # The folder of measurements holds no code; setuptools takes any folder with data for a package, and warns of those left out.
    packages=[*find_packages(include=["detr_fast", "detr_fast.*"]), "detr_fast.kernels", "detr_fast.ops.measured"],
    package_data={"detr_fast": ["py.typed", "ops/measured/*.json", "native/*.cpp", "native/*.h"]},
    package_dir={"detr_fast": "detr_fast", "detr_fast.kernels": "kernels"},
)
