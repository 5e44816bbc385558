// A compiler of CUDA that compiles nothing: FAKE_COMPILE is what it says of every program.
#include <stdlib.h>
#include <string.h>

enum { BYTES = 5000 };
static const char LOG[] = "a warning\nkernel.cu(3): error: no such thing\nmore\n";

int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
int nvrtcCreateProgram(void **program, const char *source, const char *name, int count, const char *const *headers,
                       const char *const *names) {
    return (void)source, (void)name, (void)count, (void)headers, (void)names, *program = malloc(1), 0;
}
int nvrtcCompileProgram(void *program, int count, const char *const *options) {
    (void)program, (void)count, (void)options;
    return getenv("FAKE_COMPILE") ? atoi(getenv("FAKE_COMPILE")) : 0;
}
int nvrtcDestroyProgram(void **program) { return free(*program), *program = NULL, 0; }
int nvrtcGetCUBINSize(void *program, size_t *bytes) { return (void)program, *bytes = BYTES, 0; }
int nvrtcGetCUBIN(void *program, char *code) { return (void)program, memset(code, 'k', BYTES), 0; }
int nvrtcGetProgramLogSize(void *program, size_t *bytes) { return (void)program, *bytes = sizeof LOG, 0; }
int nvrtcGetProgramLog(void *program, char *log) { return (void)program, memcpy(log, LOG, sizeof LOG), 0; }
const char *nvrtcGetErrorString(int code) { return code ? "FAKE_ERROR_COMPILATION" : "FAKE_SUCCESS"; }
