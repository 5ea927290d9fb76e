#!/bin/bash
# Base images made of this machine's own files, under the names that the project asks for, where none can be pulled.
#
#   standins.sh PYTHON_IMAGE NATS_IMAGE REDIS_IMAGE PROMETHEUS_IMAGE NATS_SERVER_BINARY
#
# They prove our Dockerfiles, wiring, configuration and code; not that the official image has this tag or content.
# Needs DOCKER_HOST, Debian, busybox-static and redis-tools; makes no Prometheus where Debian's is not installed. No
# registry, no network.
set -euo pipefail
python_image=$1 nats_image=$2 redis_image=$3 prometheus_image=$4 nats_server=$5
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# --- Debian with Python, like python:3.11-slim: the files of installed packages, and their records
packages() {
  local wanted
  wanted=$(
    dpkg-query -W -f '${Package} ${Essential} ${Priority}\n' | awk '$2 == "yes" || $3 == "required" {print $1}'
    echo apt ca-certificates libssl3 libsqlite3-0 libffi8 libbz2-1.0 liblzma5 libreadline8 zlib1g libncursesw6 \
      libuuid1 libexpat1 netbase tzdata debian-archive-keyring libstdc++6 libnuma1
  )
  # shellcheck disable=SC2086
  apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances $wanted | grep -E '^[a-z0-9]' | sed 's/:any$//; s/:amd64$//' | sort -u |
    xargs dpkg-query -W -f '${Package} ${Status}\n' 2>/dev/null | awk '/install ok installed/ {print $1}' | sort -u
}

debian() {
  local root=$work/debian package
  mkdir -p "$root"
  for link in bin sbin lib lib64; do ln -s "usr/$link" "$root/$link"; done
  mapfile -t chosen < <(packages || true)
  dpkg-query -L "${chosen[@]}" | sed -E 's#^/(bin|sbin|lib|lib64)/#/usr/\1/#' |
    grep -vE '^/usr/share/(man|locale|info|lintian|doc)/|^/\.$|^/(bin|sbin|lib|lib64)$|^/usr/local' | sort -u |
    sed 's#^/##' > "$work/files"
  (cd / && tar --no-recursion --ignore-failed-read -cf - -T "$work/files" 2>/dev/null) |
    tar -C "$root" --keep-directory-symlink -xf - || true
  mkdir -p "$root"/{proc,sys,dev,run,root,tmp,var/cache/apt/archives/partial,var/lib/apt/lists/partial} \
    "$root"/{var/lib/dpkg/info,etc/ssl/certs,etc/apt/sources.list.d}
  chmod 1777 "$root/tmp"
  cp /usr/share/base-passwd/passwd.master "$root/etc/passwd"
  cp /usr/share/base-passwd/group.master "$root/etc/group"
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  # dpkg's records of them: apt then knows what is there. It has no sources, so an update is quick.
  awk -v RS= -v ORS='\n\n' 'NR == FNR {keep[$1]; next} {name = $2} (name in keep)' \
    <(printf '%s\n\n' "${chosen[@]}") /var/lib/dpkg/status > "$root/var/lib/dpkg/status"
  touch "$root/var/lib/dpkg/available"
  cp /var/lib/dpkg/info/format "$root/var/lib/dpkg/info/"
  for package in "${chosen[@]}"; do
    cp -a /var/lib/dpkg/info/"$package".* /var/lib/dpkg/info/"$package":*.* "$root/var/lib/dpkg/info/" 2>/dev/null || true
  done
  rm -f "$root"/etc/ld.so.conf.d/*.tmp
  chroot "$root" ldconfig
  chroot "$root" sh -c 'pwconv; grpconv' || true
}

python() {
  local base
  base=$(python3.11 -c 'import sys; print(sys.base_prefix)')
  mkdir -p "$work/debian/usr/local"
  tar -C "$base" --exclude='site-packages/*' --exclude=lib/python3.11/test --exclude=__pycache__ --exclude='*.a' \
    --exclude=lib/python3.11/idlelib --exclude=lib/python3.11/tkinter -cf - bin/python3.11 bin/python3 bin/python \
    lib/libpython3.11.so.1.0 lib/python3.11 include | tar -C "$work/debian/usr/local" -xf -
  ln -sf libpython3.11.so.1.0 "$work/debian/usr/local/lib/libpython3.11.so"
  chroot "$work/debian" sh -c 'ldconfig; python3.11 -m ensurepip --default-pip' > /dev/null 2>&1
  tar -C "$work/debian" -cf - . | docker import -c 'ENV LANG=C.UTF-8' -c 'CMD ["python3"]' - "$python_image" > /dev/null
}

# --- busybox with one server in it, like the alpine images of NATS and Redis, and like that of Prometheus
small() {
  local root=$1 applet
  mkdir -p "$root"/{bin,usr/bin,etc,tmp,data,root,proc,sys,dev}
  chmod 1777 "$root/tmp"
  chmod 777 "$root/data"
  cp /bin/busybox "$root/bin/busybox"
  for applet in $(/bin/busybox --list); do [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"; done
  echo 'root:x:0:0:root:/root:/bin/sh' > "$root/etc/passwd"
  echo 'root:x:0:' > "$root/etc/group"
}

# As in the official images: options alone mean the server's own command.
entrypoint() {
  printf '#!/bin/sh\ncase "$1" in -*) set -- %s "$@";; esac\n%s\nexec "$@"\n' "$2" "${3:-}" > "$1/entrypoint.sh"
  chmod 755 "$1/entrypoint.sh"
}

nats() {
  local root=$work/nats
  small "$root"
  install -m 755 "$nats_server" "$root/bin/nats-server"
  entrypoint "$root" nats-server
  tar -C "$root" -cf - . | docker import -c 'EXPOSE 4222' -c 'ENTRYPOINT ["/entrypoint.sh"]' -c 'CMD ["nats-server"]' \
    - "$nats_image" > /dev/null
}

redis() {
  local root=$work/redis binary library
  small "$root"
  # Debian's redis-server is its redis-check-rdb under another name.
  install -m 755 "$(readlink -f /usr/bin/redis-check-rdb)" "$root/bin/redis-server"
  install -m 755 /usr/bin/redis-cli "$root/bin/redis-cli"
  for binary in redis-server redis-cli; do
    for library in $(ldd "$root/bin/$binary" | grep -o '/[^ ]*'); do cp -L --parents "$library" "$root/"; done
  done
  # The official build has protected mode off.
  entrypoint "$root" redis-server 'if [ "$1" = redis-server ]; then set -- "$@" --protected-mode no; fi'
  tar -C "$root" -cf - . | docker import -c 'EXPOSE 6379' -c 'WORKDIR /data' -c 'ENTRYPOINT ["/entrypoint.sh"]' \
    -c 'CMD ["redis-server"]' - "$redis_image" > /dev/null
}

prometheus() {
  local root=$work/prometheus library
  small "$root"
  install -m 755 "$(type -P prometheus)" "$root/bin/prometheus"
  for library in $(ldd "$root/bin/prometheus" | grep -o '/[^ ]*'); do cp -L --parents "$library" "$root/"; done
  install -d -o 65534 -g 65534 "$root/prometheus" "$root/etc/prometheus"
  tar -C "$root" -cf - . | docker import -c 'EXPOSE 9090' -c 'USER 65534:65534' -c 'WORKDIR /prometheus' \
    -c 'ENTRYPOINT ["/bin/prometheus"]' - "$prometheus_image" > /dev/null
}

debian
python
nats
redis
if type -P prometheus > /dev/null; then prometheus; fi
