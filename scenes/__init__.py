"""The embedded world: small captioned scenes, and a base to post-train on a CPU."""

# What it sets, found by measurement (experiments/README.md); all else is `Config`'s default.
SETTINGS = """
--out runs/scenes --data scenes --image-size 32 --max-steps 80 --batch-size 16 --cfg-scale 4 --top-k 0
--rollout-batch-size 64 --micro-batch-size 64 --no-gradient-checkpointing --cfg-logprobs --rank-k 2 --rank-zscore
--policy-lr 3e-4 --warmup-steps 10 --kl-coef 1 --ref-policy initial --policy-ema 0.9 --policy-ema-every 1
--disc-lr 1e-3 --disc-start 0 --gan-beta2 0.95 --lambda-d 0.05 --tau-steps 16 --decoder-ema 0.9
"""
