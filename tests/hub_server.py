"""A web server that speaks enough of the Hugging Face Hub's protocol for huggingface_hub, and plays Google Drive."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Server(ThreadingHTTPServer):
    """Files by repository, and by path for whatever is not in one."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repos = {}  # id -> {file name: content}
        self.moved = {}  # old id -> new id
        self.files = {}  # path -> content
        self.drive = {}  # file id -> content, or the HTML page that is sent instead
        self.cut_after = None  # bytes of a Drive file after which the connection breaks, once
        self.requests = []  # 'METHOD path' and the range, of each request
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.other_url = f'http://localhost:{self.server_port}'  # large files are on another host
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def send(self, status, body=b'', **headers):
        if isinstance(body, (dict, list)):
            body, headers['Content-Type'] = json.dumps(body).encode(), 'application/json'
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        if 'Content_Length' not in headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_range(self, content, **headers):
        asked = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked is None:
            return self.send(200, content, **headers)
        start = int(asked[1])
        self.send(206, content[start:], Content_Range=f'bytes {start}-{len(content) - 1}/{len(content)}', **headers)

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        url = urlsplit(self.path)
        if match := re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', url.path):
            return self.resolve(*match.groups())
        if url.path.startswith('/cdn/'):
            contents = [c for files in self.server.repos.values() for c in files.values()]
            return self.send_range(next(c for c in contents if hashlib.sha256(c).hexdigest() == url.path[5:]))
        if url.path.startswith('/drive/'):
            return self.drive(parse_qs(url.query))
        if url.path in self.server.files:
            return self.send(200, self.server.files[url.path])
        self.send(404)

    do_HEAD = do_GET

    def resolve(self, repo, revision, name):
        server = self.server
        if repo in server.moved:  # a renamed repository: a redirect on the same host
            return self.send(307, Location=f'/{server.moved[repo]}/resolve/{revision}/{name}')
        if repo not in server.repos:
            return self.send(404, X_Error_Code='RepoNotFound', X_Error_Message='Repository not found')
        contents = b''.join(server.repos[repo].values())
        commit = dict(X_Repo_Commit=hashlib.sha1(contents).hexdigest())
        if name not in server.repos[repo]:
            return self.send(404, X_Error_Code='EntryNotFound', X_Error_Message='Entry not found', **commit)
        content = server.repos[repo][name]
        digest = hashlib.sha256(content).hexdigest()
        if name.endswith('.safetensors'):
            return self.send(
                302, Location=f'{server.other_url}/cdn/{digest}', X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=len(content), **commit)
        self.send_range(content, ETag=f'"{digest}"', **commit)

    def do_POST(self):
        self.server.requests.append(f'POST {self.path}')
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path == '/api/repos/create':
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            return self.send(200, {'url': f'{self.server.url}/{repo}'})
        if self.path == '/api/validate-yaml':
            return self.send(200, {'errors': [], 'warnings': []})
        if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+', self.path):
            if match[2] == 'preupload':
                return self.send(200, {'files': [
                    {'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                    for f in json.loads(body)['files']]})
            for line in map(json.loads, body.splitlines()):
                if line['key'] == 'file':
                    content = base64.b64decode(line['value']['content'])
                    self.server.repos[match[1]][line['value']['path']] = content
            url = f'{self.server.url}/{match[1]}/commit/1'
            return self.send(200, {'success': True, 'commitOid': 'c0ffee' + '0' * 34, 'commitUrl': url})
        self.send(404)

    def drive(self, query):
        content = self.server.drive[query['id'][0]]
        if content.lstrip().startswith(b'<'):
            return self.send(200, content, Content_Type='text/html')
        if 'confirm' not in query:  # too large to be scanned for viruses: a form comes first
            return self.send(200, (
                '<html><form id="download-form" action="https://drive.usercontent.google.com/download">'
                f'<input type="hidden" name="id" value="{query["id"][0]}">'
                '<input type="hidden" name="confirm" value="t"></form></html>').encode(), Content_Type='text/html')
        headers = dict(Content_Type='application/octet-stream', Content_Disposition='attachment; filename="ckpt.pth"')
        if self.server.cut_after is None or 'Range' in self.headers:
            return self.send_range(content, **headers)
        cut, self.server.cut_after = self.server.cut_after, None
        self.send(200, content[:cut], Content_Length=len(content), **headers)
        self.close_connection = True
