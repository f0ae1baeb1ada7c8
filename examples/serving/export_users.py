# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "torch"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
Writes what encodes users as one file that PyTorch runs without mmesid and transformers.

    python examples/serving/export_users.py --model_dir runs/quickstart/recommender --output_file users.pt2
"""

import argparse

import torch

from modeling_mmesid import MMESIDForSequentialRecommendation


class UserEncoder(torch.nn.Module):
    """
    `encode_histories` as a graph of tensors: the prompt and the item tokens are computed beforehand.

    Args:
        model ([`MMESIDForSequentialRecommendation`]): The recommender, in evaluation mode.
    """

    def __init__(self, model: MMESIDForSequentialRecommendation):
        super().__init__()
        config, items = model.config, model.model.items
        self.backbone, self.head, self.scorers = model.model.backbone, model.model.user_head, model.scorers
        with torch.no_grad():
            words = self.backbone.get_input_embeddings()
            for name, ids in (("before", config.prompt_prefix_ids), ("after", config.prompt_suffix_ids)):
                self.register_buffer(name, words(torch.tensor(ids, dtype=torch.long, device=model.device))[None])
            rows = torch.arange(config.num_items + 1, device=model.device)
            tokens = items.tokens(rows) * (config.item_token_scale or 1.0)
            self.register_buffer("tokens", tokens.to(self.before.dtype))
            _, *tables = model.parts(model.item_table())
            self.tables = torch.nn.ParameterList(table.clone() for table in tables).requires_grad_(False)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """The user embedding `(1, width)` of the item rows of one history `(1, length)`, oldest first."""
        inputs = torch.cat([self.before, self.tokens[items], self.after], dim=1)
        length = inputs.shape[1]
        # Given, for the library would make it by a way that cannot be exported.
        mask = torch.ones(length, length, dtype=torch.bool, device=items.device).tril()[None, None]
        positions = torch.arange(length, device=items.device)[None]
        output = self.backbone(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        state = self.head(output.last_hidden_state[:, -1])
        return torch.cat([state, *self.scorers.states(items, list(self.tables))], dim=-1)


def export(model: MMESIDForSequentialRecommendation) -> torch.export.ExportedProgram:
    """The user encoder for histories of 1 to `max_history` items."""
    length = torch.export.Dim("length", max=model.config.max_history)
    example = torch.ones(1, min(3, model.config.max_history), dtype=torch.long, device=model.device)
    with torch.no_grad():
        return torch.export.export(UserEncoder(model), (example,), dynamic_shapes={"items": {1: length}})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write what encodes users as one file for PyTorch.")
    parser.add_argument("--model_dir", required=True, help="directory written by `mmesid finetune`")
    parser.add_argument("--output_file", required=True, help="file to write, .pt2")
    arguments = parser.parse_args(argv)
    model = MMESIDForSequentialRecommendation.from_pretrained(arguments.model_dir).eval()
    settings = {"max_history": str(model.config.max_history)}
    torch.export.save(export(model), arguments.output_file, extra_files=settings)


if __name__ == "__main__":
    main()
