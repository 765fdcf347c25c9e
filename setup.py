"""Maps the folder ``kernels/`` to the package ``fastmae.kernels``; everything else stands in pyproject.toml.

The folder has no ``__init__.py``: from the root of the tree it could otherwise be imported as ``kernels``, in place of
the package of that name on PyPI, which transformers looks for.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastmae", "fastmae.*"], exclude=["fastmae.kernels"]), "fastmae.kernels"],
    package_dir={"fastmae.kernels": "kernels"},
    package_data={"fastmae": ["py.typed"], "fastmae.ops": ["attention_choices.json"]},
)
