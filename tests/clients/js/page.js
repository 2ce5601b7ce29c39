// Runs in a page: asks the gateway, which is another origin, and reports to the page's own server what it could read.
// XMLHttpRequest and not fetch, so that jsdom runs it, too; the rules of CORS are the same.
function ask(method, url, headers, body) {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    request.open(method, url);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.onloadend = () => {
      const names = request.getAllResponseHeaders().trim().split("\r\n").map((line) => line.split(":")[0].toLowerCase());
      resolve({ status: request.status, names, body: request.responseText });
    };
    request.send(body);
  });
}

async function run({ url, key, question }) {
  const headers = { "Content-Type": "application/json", "X-Visual-Token-Budget": "low", "X-Stainless-Lang": "js" };
  const post = (secret) =>
    ask("POST", `${url}/v1/chat/completions`, { ...headers, Authorization: `Bearer ${secret}` }, JSON.stringify(question));
  const report = { answer: await post(key), refusal: await post("wrong"), health: await ask("GET", `${url}/health`, {}) };
  await ask("POST", "/report", {}, JSON.stringify(report));
}

run(JSON.parse(document.getElementById("order").textContent));
