"""What pyproject.toml cannot say: recipes/ becomes ssl_vit/recipes in a wheel."""

from setuptools import find_namespace_packages, find_packages, setup

recipes = ["ssl_vit.recipes", *(f"ssl_vit.recipes.{folder}" for folder in find_namespace_packages("recipes"))]
setup(
    packages=[*find_packages(include=["ssl_vit*", "eval*"]), *recipes],
    package_dir={"ssl_vit.recipes": "recipes"},
    package_data={"eval": ["**/*.css"], **{package: ["*.yaml"] for package in recipes}},
)
