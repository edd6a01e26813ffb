"""What the original code calls `models.py`: pickled adapters name this module and this class."""

import torch


class VisualToGPTMapping(torch.nn.Module):
    def __init__(self, visual_emb_dim, gpt_emb_dim, num_gpt_embs, num_heads, mlp=2048):
        super().__init__()
        self.transformer_layer = torch.nn.TransformerEncoderLayer(
            visual_emb_dim, num_heads, mlp, batch_first=True, norm_first=False
        )
        self.linear = torch.nn.Linear(visual_emb_dim, gpt_emb_dim)
        self.n_embeddings, self.embedding_dim = num_gpt_embs, gpt_emb_dim

    def forward(self, x):
        return self.linear(self.transformer_layer(x)).view(-1, self.n_embeddings, self.embedding_dim)
