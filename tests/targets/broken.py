"""A module that cannot be imported."""

import not_a_module
