"""Writing captions: the image is encoded once, and each new token costs one token's work."""

import torch


@torch.inference_mode()
def generate_ids(model, images, sequences, max_tokens=50, temperature=1.0, deterministic=False):
    """Continue each sequence by up to `max_tokens` tokens, for a batch of images.

    images (B, 3, H, W); sequences (B, T) start with BOS. Greedy when `deterministic`, else sampled from
    softmax(logits / temperature). Returns ids (B, T + new) on the model's device; what follows a row's first
    generated EOS is EOS. Stops when every row has ended. Dropout is off; the model's mode is restored afterwards.
    The caption is cut where the decoder's seq_len ends. Raises ValueError when temperature is not positive.
    """
    if not deterministic and temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}; for the likeliest token use deterministic")
    max_tokens = min(max_tokens, model.config.seq_len - sequences.size(1))
    was_training = model.training
    model.eval()
    try:
        eos = model.config.eos_token_id
        encoder_states = model.encoder_states(images)
        caches = model.new_caches(sequences.size(1) + max_tokens)
        ended = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)  # (B,)
        newest = sequences
        for _ in range(max_tokens):
            hidden = model.decode(newest, encoder_states, caches)[:, -1]  # (B, embed_dim) of the last token
            logits = model.gpt.logits(hidden).float()  # (B, vocab_size)
            if deterministic:
                newest = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                newest = torch.multinomial((logits / temperature).softmax(-1), 1)  # (B, 1)
            newest = newest.masked_fill(ended[:, None], eos)
            sequences = torch.cat([sequences, newest], dim=1)
            ended |= newest[:, 0] == eos
            if ended.all():
                break
        return sequences
    finally:
        model.train(was_training)
