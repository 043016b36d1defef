"""The selection loss in a wrapped model: hears the layers that select and read, and adds to the training loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..row_attention import RowMask
from ..selection_loss import cell_scores, region_attention, selection_loss

if TYPE_CHECKING:
    from .context import FlexContext


class Teaching:
    """One forward pass' selection loss, see `flexcore.selection_loss`.

    Args:
        weight: Of the mean over layers and rows, in the loss.
        items: Answer tokens of the whole optimizer step, as Trainer counts them; None: the mean is over this batch's
            rows.
    """

    def __init__(self, weight: float, items: Any = None):
        self.weight = weight
        self.items = items
        self._scores: dict[int, Tensor] = {}
        self._terms: dict[int, list[Tensor]] = {}

    @classmethod
    def of(cls, model: Any, kwargs: dict[str, Any]) -> Teaching | None:
        """For a forward that trains with a selection loss; None for any other."""
        weight = model._flex_binding.config.selection_loss
        if not weight or not model.training or not torch.is_grad_enabled() or kwargs.get("labels") is None:
            return None
        return cls(weight, kwargs.get("num_items_in_batch"))

    def selects(self, layer: int, *where: Tensor, **how: Any) -> None:
        """A layer selects; arguments as for `cell_scores`."""
        self._scores[layer] = cell_scores(*where, **how)

    def reads(
        self,
        context: FlexContext,
        layer: int,
        sample: int,
        picked: tuple[Tensor, Tensor],
        query: Tensor,
        fine_key: Tensor,
        fine_mask: RowMask | None,
        lse: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> None:
        """A layer reads what an earlier one selected; of a pyramid's levels only the first is taught.

        Args:
            context: The forward pass.
            layer: The reading layer.
            sample: Whose rows they are.
            picked: The rows' selection `[R, U]` among the U regions that any of them reads, and those regions.
            query: `[1, Hq, R, D]`.
            fine_key: `[1, Hkv, U * P, D]`.
            fine_mask: What each row sees of the fine keys.
            lse: `[1, Hq, R]` of the ordinary keys.
            scaling: Factor on the logits.
            softcap: See `row_attention`.
        """
        selecting = context.binding.reads_from[layer]
        if selecting not in self._scores:
            return
        state = context.request.samples[sample]
        selected, regions = picked
        n = len(regions)
        attention = region_attention(query, fine_key, fine_mask, lse, n, scaling=scaling, softcap=softcap)
        scores = self._scores[selecting]
        batch_rows, _, slots = (t.to(scores.device) for t in context.index[sample])
        cells = scores[batch_rows, slots][:, : len(state.cells)]
        attention, selected = attention.to(cells.device), selected.to(cells.device)
        total = cells.new_zeros(len(cells))
        for m, where, local in state.by_medium(regions):
            if m >= len(state.media):
                continue
            grid = state.streams[m].grid
            of_regions = grid.pool(cells[:, state.span(m)])[:, local.to(cells.device)]
            at = where.to(cells.device)
            total = total + selection_loss(of_regions, attention[:, at], selected[:, at])
        self._terms.setdefault(layer, []).append(total)

    def added(self, out: Any, reentrant: bool) -> Any:
        """The model's output with the loss added to its own, if anything that trains takes part in it.

        Args:
            out: What the model returned.
            reentrant: Whether layers ran under a reentrant checkpoint.

        Raises:
            ValueError: The layers ran under reentrant gradient checkpointing, which keeps no graph for it.
        """
        if not self._terms:
            return out
        joined = [torch.cat(rows) for rows in self._terms.values()]
        # Trainer adds up accumulated batches and processes whose losses are over the tokens of all of them
        terms = [r.mean() if self.items is None else r.sum() / self.items for r in joined]
        if reentrant:
            raise ValueError(
                "use_reentrant must be False in gradient_checkpointing_kwargs for a selection_loss (reentrant "
                f"checkpointing keeps no graph for it), got selection_loss={self.weight}"
            )
        if not any(term.requires_grad for term in terms):
            return out  # nothing below a selecting layer's scores trains
        loss = out[0] if isinstance(out, tuple) else out.loss
        extra = self.weight * torch.stack([term.to(loss.device) for term in terms]).mean()
        if isinstance(out, tuple):
            return (loss + extra.to(loss.dtype), *out[1:])
        out.loss = loss + extra.to(loss.dtype)
        return out
