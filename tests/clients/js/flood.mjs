// A flood with autocannon: as many requests as the connections carry, until the time is over. Prints one JSON object.
// Standard input: {url, seconds, connections, most, bodies: [request body, ...]}. Each connection sends them in turn.

import { text } from "node:stream/consumers";

import autocannon from "autocannon";

const { url, seconds, connections, most, bodies } = JSON.parse(await text(process.stdin));

const statuses = {};
const okEachSecond = Array(seconds + 1).fill(0);
const retryAfter = new Set();
const strange = [];
const began = performance.now();

function onResponse(status, body, _context, headers) {
  statuses[status] = (statuses[status] ?? 0) + 1;
  if (status === 200) {
    okEachSecond[Math.min(Math.floor((performance.now() - began) / 1000), seconds)] += 1;
  } else if (status === 429 || status === 503) {
    const name = Object.keys(headers).find((header) => header.toLowerCase() === "retry-after");
    retryAfter.add(name ? headers[name] : null);
  } else if (strange.length < 3) {
    strange.push({ status, body: String(body).slice(0, 300) });
  }
}

const result = await autocannon({
  url,
  connections,
  duration: seconds,
  maxOverallRequests: most,
  timeout: 30,
  requests: bodies.map((body) => ({
    method: "POST",
    path: "/v1/chat/completions",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    onResponse,
  })),
});

console.log(
  JSON.stringify({
    statuses,
    ok_each_second: okEachSecond,
    retry_after: [...retryAfter],
    strange,
    errors: result.errors,
    timeouts: result.timeouts,
    latency_ms: { p50: result.latency.p50, p99: result.latency.p99, max: result.latency.max },
  }),
);
