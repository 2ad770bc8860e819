# One image for every role: `snode controller`, `snode node`, `snode all`.
#   docker build -t snode-csi .
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md ./
COPY csi csi
RUN python3 -m venv /opt/snode && /opt/snode/bin/pip install --no-cache-dir --no-compile . \
 && /opt/snode/bin/pip uninstall -y pip

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3 lvm2 thin-provisioning-tools tgt open-iscsi e2fsprogs xfsprogs btrfs-progs mount util-linux kmod \
 && rm -rf /var/lib/apt/lists/* /etc/iscsi/initiatorname.iscsi
COPY --from=build /opt/snode /opt/snode
ENV PATH=/opt/snode/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["snode"]
CMD ["all"]
