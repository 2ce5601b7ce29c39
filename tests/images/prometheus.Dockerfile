# A stand-in for the image prom/prometheus, from Debian's package, for machines that cannot pull it: the same user, port,
# folders and arguments. Built by test_compose_up.py.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends prometheus wget \
    && mkdir -p -m 1777 /prometheus
VOLUME /prometheus
USER 65534:65534
EXPOSE 9090
ENTRYPOINT ["/usr/bin/prometheus"]
