"""Maps the folder ``kernels/`` to the package ``fastmae.kernels``; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastmae", "fastmae.*"], exclude=["fastmae.kernels"]), "fastmae.kernels"],
    package_dir={"fastmae.kernels": "kernels"},
    package_data={"fastmae": ["py.typed"]},
)
