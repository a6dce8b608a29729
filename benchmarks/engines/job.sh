#!/usr/bin/env bash
# Accuracy, decode profile and throughput of one engine with fi and with its own backends, most important first.
# usage: job.sh vllm|sglang SITE OUT [MODELS]      SITE: the engine's unpacked site folder ("" where it is installed)
# env: PYTHON (default python3), KINDS (default "llama gemma2 qwen3 gpt_oss"), WORKLOADS, REQUESTS, ROUNDS, RATE
# Every part has its own time limit and process; what is done by then is in OUT.
set -u
engine=$1 site=$2 out=$3 models=${4:-$3/models}
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3} kinds=${KINDS:-llama gemma2 qwen3 gpt_oss}
mkdir -p "$out" "$models"
folders=$(ls -d "$root"/packages/*/src "$root"/integrations/*/src "$root/packages/dist-info" | tr '\n' ':')
"$python" "$here/dist_info.py" "$out/dist-info" > /dev/null
plain=$folders$out/dist-info:$site:${PYTHONPATH:-}
export PYTHONPATH=$plain HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CACHE_ROOT=$out/cache
[ "$engine" = sglang ] && export SGLANG_IS_FLASHINFER_AVAILABLE=false

case $engine in
  vllm) ours=CUSTOM own="FLASH_ATTN TRITON_ATTN"
        small='{"max_model_len": 1024, "max_num_seqs": 64, "gpu_memory_utilization": 0.3, "enable_prefix_caching": true}'
        large='{"load_format": "dummy", "max_model_len": 36864, "max_num_seqs": 256, "gpu_memory_utilization": 0.85}' ;;
  sglang) ours=fi own="triton"
        small='{"context_length": 1024, "max_running_requests": 64, "mem_fraction_static": 0.3}'
        large='{"load_format": "dummy", "context_length": 36864, "max_running_requests": 256, "mem_fraction_static": 0.8}' ;;
  *) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac

choose() { # choose BACKEND: the engine's own backends run with the engine's own layers and sampler
  if [ "$1" = "$ours" ]; then unset VLLM_PLUGINS; else export VLLM_PLUGINS=fi_gpt_oss_attention; fi
}

part() { # part SECONDS NAME COMMAND...
  local limit=$1 name=$2; shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1; local status=$?
  echo "$name: exit status $status"; [ $status -eq 0 ] || tail -4 "$out/$name.log"
}

draw="g = torch.Generator('cuda').manual_seed(1); torch.empty(1, dtype=torch.int64, device='cuda').random_(generator=g)"
"$python" -c "import torch; $draw; print('a draw of a seeded request takes', g.get_offset(), 'of its generator; vLLM takes back 4')"

for kind in $kinds; do
  [ -e "$models/$kind/config.json" ] || part 120 "model_$kind" "$python" "$here/models.py" "$kind" "$models/$kind" --size small
  tokens=() files=()
  for backend in $ours $own; do
    choose "$backend"
    file=$out/accuracy_${kind}_$backend.json
    [ "$kind" = gpt_oss ] && export PYTHONPATH=$here/gpt_oss_attention:$plain || export PYTHONPATH=$plain
    part 150 "accuracy_${kind}_$backend" "$python" "$here/accuracy.py" run "$engine" "$models/$kind" "$backend" "$file" --options "$small" "${tokens[@]}"
    [ -e "$file" ] && { files+=("$file"); [ ${#tokens[@]} -gt 0 ] || tokens=(--tokens "$file"); }
  done
  [ ${#files[@]} -gt 1 ] && "$python" "$here/accuracy.py" compare "${files[@]}" | tee "$out/accuracy_$kind.txt"
done

export PYTHONPATH=$plain
choose "$ours"
# With the plugin that raises at a synchronisation.
PYTHONPATH=$here/no_sync:$plain part 150 no_sync "$python" "$here/throughput.py" "$engine" "$models/llama" "$ours" "$out/guarded.jsonl" --workloads short --requests 128 --options "$small"
grep -h fi_no_sync "$out/no_sync.log"

"$python" "$here/models.py" llama "$models/llama8b" --size 8b --config-only
if [ "$engine" = vllm ]; then
  for backend in $ours $own; do
    choose "$backend"
    part 150 "profile_$backend" "$python" "$here/decode_profile.py" "$models/llama8b" "$backend" "$out/profile_$backend.json" --options "$large"
    tail -1 "$out/profile_$backend.log"
  done
fi
for round in $(seq "${ROUNDS:-3}"); do
  for backend in $ours $own; do
    choose "$backend"
    part 400 "throughput_${backend}_$round" "$python" "$here/throughput.py" "$engine" "$models/llama8b" "$backend" "$out/throughput.jsonl" \
      --workloads "${WORKLOADS:-uniform,chat,long,prefix}" --requests "${REQUESTS:-128}" --options "$large"
  done
done

for backend in $ours $own; do
  choose "$backend"
  part 300 "online_$backend" "$python" "$here/online.py" "$engine" "$models/llama8b" "$backend" "$out/online.jsonl" \
    --workloads chat,uniform --rate "${RATE:-8}" --requests "${REQUESTS:-128}" --options "$large"
done
