// Opens a page as a browser would, in jsdom, and stays: node jsdom.mjs URL
import { JSDOM } from "jsdom";

await JSDOM.fromURL(process.argv[2], { runScripts: "dangerously", resources: "usable" });
setInterval(() => {}, 1000);
