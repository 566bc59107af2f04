# What a TPU host does at every boot, as root: it fetches the code, sets it up and trains, again while that ends with exit code 75.
# launch/sweeps/tpu.py writes the variables before it. Two come from the environment, by their usual names, where the cloud's
# servers are elsewhere: STORAGE_EMULATOR_HOST and GCE_METADATA_HOST.
set -u
export HOME="${HOME:-/root}" JAX_COMPILATION_CACHE_DIR="$compiled"
storage="${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}"
again=75

metadata() {
  curl -fsS --retry 3 -H "Metadata-Flavor: Google" \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/$1"
}

# curl, as the host's service account
authorized() {
  local token
  token=$(metadata service-accounts/default/token | sed 's/.*"access_token" *: *"\([^"]*\)".*/\1/')
  curl -fsS --retry 5 --retry-all-errors -H "Authorization: Bearer $token" "$@"
}

# A file → an object of the run's folder
put() {
  authorized -o /dev/null -X POST -H "Content-Type: text/plain" -T "$1" \
    "$storage/upload/storage/v1/b/$bucket/o?uploadType=media&name=$folder%2F$2"
}

mkdir -p "$home"
name=$(metadata name || hostname)
log="$home/$(date -u +%Y%m%dT%H%M%SZ).txt"
exec >"$log" 2>&1
echo "$name, boot of $(date -u)"

# The end of the log, to the bucket
keep() {
  tail -c 16M "$log" >"$log.copy"
  put "$log.copy" "logs%2F$name-$(basename "$log")"
}

while sleep "$seconds"; do
  [ "$log" -nt "$log.copy" ] && keep
done &
copies=$!

# An exit code that does not mean "again" is for the launcher, who may not learn it otherwise.
end() {
  kill "$copies"
  echo "$name ends with exit code $1"
  keep
  if [ "$1" != "$again" ]; then
    echo "$1" >"$home/code.txt"
    put "$home/code.txt" "logs%2Fended%2F$name"
  fi
  exit "$1"
}

mounted() {
  mountpoint -q "$mounts/$1" && return
  if ! command -v gcsfuse >/dev/null; then
    local source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsS --retry 5 --retry-all-errors -o "$key" "$source/doc/apt-key.gpg" || return
    echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" >/etc/apt/sources.list.d/gcsfuse.list
    apt-get -o DPkg::Lock::Timeout=600 -qq update
    apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse || return
  fi
  mkdir -p "$mounts/$1"
  gcsfuse --implicit-dirs "$1" "$mounts/$1"
}

code="$home/$archive"
if [ ! -d "$code" ]; then
  rm -rf "$code.part" && mkdir "$code.part"
  authorized -o "$code.part.tar.gz" "$storage/storage/v1/b/$bucket/o/$archives%2F$archive.tar.gz?alt=media" || end 1
  tar -xzf "$code.part.tar.gz" -C "$code.part" && mv "$code.part" "$code" || end 1
fi
cd "$code" || end 1
for each in $buckets; do
  mounted "$each" || end 1
done
launch/setup.sh "$extras" || { sleep "$seconds" && launch/setup.sh "$extras"; } || end 1

while true; do
  .venv/bin/python launch/train.py "${arguments[@]}"
  result=$?
  [ "$result" = "$again" ] || end "$result"
  # This machine is about to go: the next boot goes on, or another machine.
  [ "$(metadata preempted)" = TRUE ] && end "$again"
  [ "$(metadata maintenance-event)" = TERMINATE_ON_HOST_MAINTENANCE ] && end "$again"
  echo "$name starts again"
done
