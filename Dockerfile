# One image for every role: `snode controller`, `snode node`, `snode all`, `snode docker`. See docs/reference/image.md.
#   docker build -t snode-csi .
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir 'hatchling>=1.25'
WORKDIR /src
# What the driver stands on comes first, since it changes less often. Of the kubernetes client goes what the driver does
# not call, half of this image otherwise: the asyncio variant, and a class for each API.
COPY pyproject.toml ./
RUN python3 -m venv --without-pip /opt/snode \
 && python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print("\n".join(p["dependencies"] + p["optional-dependencies"]["kubernetes"]))' > /requirements \
 && /build/bin/pip --python /opt/snode/bin/python install --no-cache-dir -r /requirements \
 && /build/bin/pip --python /opt/snode/bin/python uninstall -y \
      aiohttp aiohttp-retry aiosignal aiohappyeyeballs frozenlist multidict propcache yarl \
 && cd /opt/snode/lib/python3*/site-packages/kubernetes && rm -r aio client/api/*_api.py client/api/__pycache__
COPY README.md ./
COPY csi csi
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /build/bin/pip --python /opt/snode/bin/python install --no-deps --no-index /wheels/*.whl

FROM ${BASE}
# Left out: documentation, and parts of packages that nothing here runs (tgt-admin's Perl, xfs_scrub's ICU, udev's names
# of hardware).
RUN printf 'path-exclude=%s\n' '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/perl/*' \
      '/usr/lib/*/perl/*' '/usr/lib/*/libperl.so*' '/usr/lib/*/libicu*' '/usr/lib/udev/hwdb.d/*' > /etc/dpkg/dpkg.cfg.d/small \
 && printf 'path-include=%s\n' '/usr/share/doc/*/copyright' >> /etc/dpkg/dpkg.cfg.d/small \
 && apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 lvm2 thin-provisioning-tools tgt open-iscsi e2fsprogs xfsprogs btrfs-progs mount util-linux kmod \
      systemd-standalone-sysusers \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/* /etc/iscsi/initiatorname.iscsi
COPY --from=build /opt/snode /opt/snode
ENV PATH=/opt/snode/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["snode"]
CMD ["all"]
