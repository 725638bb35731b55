"""What learns from images before it can be used."""

from torch import Tensor, nn

from ssl_vit.errors import require


class Fitted(nn.Module):
    """A module with a method `fit`, whose buffers are 0 until then."""

    checked = False

    def check_fitted(self, learnt: Tensor) -> None:
        """Raises ValueError if the buffer is still 0. It is read once, not in every step."""
        if not self.checked and not learnt.is_meta:
            require(
                bool(learnt.any()),
                f"{type(self).__name__} has not been fitted: call fit(images, seed) first, or load its state.",
            )
            self.checked = True
