#!/bin/bash
# Train on several hosts with Slurm: `sbatch recipes/slurm.sh --recipe vit_gpt2_flickr30k --epochs 10`, or any other
# options of the script. torchrun starts a process a GPU on every host.
#
# To be changed: hosts (--nodes), GPUs of a host (--gpus-per-node), hours (--time), and the account or partition of your
# cluster. `data_dir` and `model_path` must be on a disk that all hosts see. A batch is batch_size captions a process:
# with 2 x 8 GPUs a step has 16 times as many as on one, which mostly wants a larger --lr (twice as large, say) and a
# smaller --batch_size.

#SBATCH --job-name=captioner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --output=captioner-%j.log
#SBATCH --requeue
#SBATCH --signal=TERM@120

# --requeue and --signal: two minutes before the time is over the run saves its state in model_path/last and ends; put
# into the queue again, it goes on from there.

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A host that fails is given a new store of addresses, which PyTorch does not do by itself on more than one host.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=1

srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py --resume auto "$@"
