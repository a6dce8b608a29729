#!/usr/bin/env bash
# Accuracy, checks that nothing waits for the device and that a full cache loses nothing, throughput and latency of one engine, with fi and with its own backends.
# usage: job.sh vllm|sglang SITE OUT [WORK]     SITE: the engine's unpacked site folder ("" where it is installed)
#                                               WORK: models, caches and whole results (default OUT/work); OUT gets logs and tables
# env: PYTHON (default python3), PARTS (default "accuracy no_sync pressure speed"), KINDS (default "llama gemma2 qwen3 gpt_oss",
#      smollm2 too where GGUF names its file),
#      TOGETHER (processes at once where speed is not measured, default 6), OWN (the engine's backends for speed),
#      SKIP (a regular expression of parts to leave out), WORKLOADS, REQUESTS, ROUNDS, KV_GIB (cache of each engine under
#      speed), LIMIT (seconds for speed)
# Every part has its own time limit, process and log; what is done by then is in OUT.
set -u
engine=$1 site=$2 out=$3 work=${4:-$3/work}
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3} together=${TOGETHER:-6}
mkdir -p "$out" "$work/models"
folders=$(ls -d "$root"/packages/*/src "$root"/integrations/*/src "$root/packages/dist-info" | tr '\n' ':')
"$python" "$here/dist_info.py" "$work/dist-info" > /dev/null
plain=$folders$work/dist-info:$site:${PYTHONPATH:-}
export PYTHONPATH=$plain HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CACHE_ROOT=$work/cache
[ "$engine" = sglang ] && export SGLANG_IS_FLASHINFER_AVAILABLE=false

kv_gib=${KV_GIB:-24}
case $engine in
  vllm) ours=CUSTOM own="FLASH_ATTN TRITON_ATTN"
        small='{"max_model_len": 1024, "max_num_seqs": 64, "gpu_memory_utilization": 0.04, "kv_cache_memory_bytes": 1073741824, "enable_prefix_caching": true}'
        large='{"load_format": "dummy", "logits_processors": null, "async_scheduling": null, "max_model_len": 36864, "max_num_seqs": 256, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": '$((kv_gib << 30))'}' ;;
  sglang) ours=fi own=triton
        small='{"context_length": 1024, "max_running_requests": 64, "mem_fraction_static": 0.97, "max_total_tokens": 65536, "chunked_prefill_size": 2048, "cuda_graph_bs_decode": [1, 4, 16, 64], "cuda_graph_bs_prefill": [256, 2048]}'
        large='{"load_format": "dummy", "context_length": 36864, "max_running_requests": 256, "mem_fraction_static": 0.97, "max_total_tokens": '$((kv_gib * 8192))', "cuda_graph_max_bs_decode": 128, "cuda_graph_bs_prefill": [256, 1024, 4096, 8192]}' ;;
  *) sed -n '3,4p' "$0" >&2; exit 2 ;;
esac

choose() { # choose BACKEND: the engine's own backends run with the engine's own layers and sampler
  if [ "$1" = "$ours" ]; then unset VLLM_PLUGINS; else export VLLM_PLUGINS=fi_gpt_oss_attention; fi
}

part() { # part SECONDS NAME COMMAND...; left out where SKIP matches the name
  [[ -n "${SKIP:-}" && "$2" =~ $SKIP ]] && return 1
  local limit=$1 name=$2 start=$SECONDS; shift 2
  timeout --foreground -k 3 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null; local status=$?
  echo "$name: exit status $status after $((SECONDS - start)) s"
  [ $status -eq 0 ] || grep -E '^[A-Za-z_.]*(Error|Exception|assert)' "$out/$name.log" | tail -2
  return $status
}

running=() # what beside started
beside() { # beside COMMAND...: in the background, as soon as fewer than $together run
  while [ "$(jobs -rp | wc -l)" -ge "$together" ]; do wait -n; done
  "$@" &
  running+=($!)
}

await() { # everything that beside started
  [ ${#running[@]} -gt 0 ] && wait "${running[@]}"
  running=()
}

texts=() # for smollm2: what prompts are cut from
for page in architecture shared_prefixes device_headers adding_a_backend adding_an_operation; do texts+=(--text "$root/docs/$page.md"); done

accuracy() { # accuracy KIND BACKEND NAME OPTIONS; NAME fi_attention: the engine's own layers and sampler
  local text=()
  choose "$2"
  [ "$3" = fi_attention ] && export VLLM_PLUGINS=fi,fi_gpt_oss_attention
  [ "$1" = gpt_oss ] && export PYTHONPATH=$here/gpt_oss_attention:$plain
  [ "$1" = smollm2 ] && text=("${texts[@]}")
  part 150 "accuracy_$1_$3" "$python" "$here/accuracy.py" run "$engine" "$work/models/$1" "$2" "$work/accuracy_$1_$3.json" --name "$3" --options "$small" --options "$4" "${text[@]}"
}

compare() { # compare KIND NAME OWN...: fi's run by name, against the engine's
  local files=() name
  [ -e "$work/accuracy_$1_$2.json" ] || return 0
  for name in "${@:2}"; do [ -e "$work/accuracy_$1_$name.json" ] && files+=("$work/accuracy_$1_$name.json"); done
  [ ${#files[@]} -gt 1 ] && "$python" "$here/accuracy.py" compare "${files[@]}" $(ls "$work"/reference_"$1"*.json 2> /dev/null) "$out/accuracy.jsonl" | sed "s/^/$1 /" | tee -a "$out/accuracy.txt"
}

others() { # the engine's own runs of one kind: a line each of BACKEND, NAME and OPTIONS
  local backend
  for backend in $own; do echo "$backend $backend {}"; done
  [ "$engine" = sglang ] || return 0
  echo 'triton triton_eager {"disable_cuda_graph": true, "triton_attention_num_kv_splits": 3}'
  case $1 in llama | qwen3) echo 'torch_native torch_native {}' ;; esac
}

ways() { # ways of one kind: a line each of NAME and OPTIONS
  echo 'fi {}'
  [ "$engine" = vllm ] && echo 'fi_attention {}'
  [ "$1" = llama ] || return 0
  [ "$engine" = vllm ] && cat << 'WAYS'
fi_eager {"enforce_eager": true}
fi_full {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}}
fi_compiled {"compilation_config": {}}
WAYS
  [ "$engine" = sglang ] && echo 'fi_eager {"disable_cuda_graph": true}'
  return 0
}

fp8='{"kv_cache_dtype": "fp8_e4m3"}'
models() {
  local kind
  for kind in $kinds; do
    [ -e "$work/models/$kind/config.json" ] && continue
    if [ "$kind" = smollm2 ]; then beside part 120 model_smollm2 "$python" "$here/gguf_model.py" "$GGUF" "$work/models/smollm2"
    else beside part 120 "model_$kind" "$python" "$here/models.py" "$kind" "$work/models/$kind" --size small; fi
  done
  await
}

references() { # in float32, once for each kind
  local kind
  for kind in $kinds; do
    [ -e "$work/reference_$kind.json" ] && continue
    if [ "$kind" = smollm2 ]; then beside part 100 reference_smollm2 "$python" "$here/reference.py" llama "$work/models/smollm2" "$work/reference_smollm2.json" "${texts[@]}"
    else beside part 100 "reference_$kind" "$python" "$here/reference.py" "$kind" "$work/models/$kind" "$work/reference_$kind.json"; fi
  done
  beside part 100 reference_llama_fp8 "$python" "$here/reference.py" llama "$work/models/llama" "$work/reference_llama_kv.json" --kv e4m3
}

all_accuracy() {
  local kind backend name options
  for kind in $kinds; do
    while read -r name options; do beside accuracy "$kind" "$ours" "$name" "$options"; done < <(ways "$kind")
    while read -r backend name options; do beside accuracy "$kind" "$backend" "$name" "$options"; done < <(others "$kind")
    [ "$kind" = llama ] && for backend in $ours $own; do beside accuracy "$kind" "$backend" "${backend}_fp8" "$fp8"; done
  done
}

compare_all() {
  local kind name
  for kind in $kinds; do
    while read -r name _; do compare "$kind" "$name" $(others "$kind" | cut -d ' ' -f 2); done < <(ways "$kind")
  done
  compare llama "${ours}_fp8" ${own// /_fp8 }_fp8
}

no_sync() { # with the plugin that raises at a synchronisation
  choose "$ours"
  export PYTHONPATH=$here/no_sync:$plain
  part 150 no_sync "$python" "$here/throughput.py" "$engine" "$work/models/llama" "$ours" "$work/guarded.jsonl" --workloads short,sampled --requests 128 --options "$small"
  grep -hs fi_no_sync "$out/no_sync.log"
}

pressure() { # pressure NAME KIND OPTIONS [VARIABLE=VALUE ...]
  choose "$ours"
  part 150 "$1" env "${@:4}" "$python" "$here/pressure.py" "$engine" "$work/models/$2" "$ours" --options "$small" --options "$3"
  grep -hs '^pressure' "$out/$1.log" | cut -c1-300
}

all_pressure() { # also with every index checked on the device, and with some calls compared with fi's reference
  beside pressure pressure llama '{}'
  beside pressure pressure_checked llama '{}' FI_CHECK=1
  if [ "$engine" = sglang ]; then
    beside pressure pressure_shadow llama '{"disable_cuda_graph": true}' FI_SHADOW=0.02
    return 0
  fi
  beside pressure pressure_shadow llama '{}' FI_SHADOW=0.02
  beside pressure pressure_ngram llama '{"logits_processors": null, "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 4}}'
  beside pressure pressure_v2_runner qwen3 '{"logits_processors": null}' VLLM_USE_V2_MODEL_RUNNER=1
}

speed_of() { # speed_of BACKEND OF
  local loads=${WORKLOADS:-fixed,sampled,long,prefix,chat@16,uniform@16,profile} profile=()
  choose "$1"
  case ",$loads," in *,profile,*) profile=(--profile "$out/profile_$1.json") ;; esac
  part "${LIMIT:-500}" "speed_$1" "$python" "$here/throughput.py" "$engine" "$work/models/llama8b" "$1" "$out/throughput.jsonl" --options "$large" \
    --workloads "$loads" --requests "${REQUESTS:-64}" --rounds "${ROUNDS:-3}" --turns "$work/turns" --of "$2" "${profile[@]}"
  touch "$work/turns/ready.$1"
}

speed() { # in the background: the engines load, and measure in turns when the gate is opened
  local backends="$ours ${OWN:-$own}" backend
  rm -rf "$work/turns"; mkdir -p "$work/turns"
  for backend in $backends; do speed_of "$backend" $(($(wc -w <<< "$backends") + 1)) & done
}

kinds=${KINDS:-llama gemma2 qwen3 gpt_oss}
draw="g = torch.Generator('cuda').manual_seed(1); torch.empty(1, dtype=torch.int64, device='cuda').random_(generator=g)"
"$python" -c "import torch; $draw; print('a draw of a seeded request takes', g.get_offset(), 'of its generator; vLLM takes back 4')"
"$python" "$here/models.py" llama "$work/models/llama8b" --size 8b --config-only
parts=" ${PARTS:-accuracy no_sync pressure speed} "
case $parts in *" accuracy "* | *" no_sync "* | *" pressure "*) models ;; esac
case $parts in *" speed "*) speed ;; esac
case $parts in *" accuracy "*) all_accuracy; references ;; esac
case $parts in *" no_sync "*) beside no_sync ;; esac
case $parts in *" pressure "*) all_pressure ;; esac
await
mkdir -p "$work/turns"; touch "$work/turns/ready.gate"
case $parts in *" accuracy "*) compare_all; tar -C "$work" -czf "$out/accuracy.tgz" $(cd "$work" && ls | grep -E '^(accuracy|reference)_.*json$') ;; esac
wait
