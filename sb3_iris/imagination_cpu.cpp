// The world model's passes of imagination on a CPU: see imagination_cpu.py, which compiles this file and calls it.
//
// A pass reads one or a few new positions of each game. What it costs is reading weights, keys and values, so both are laid
// out to be read in order, by vectors, and whole frames of tokens are sampled without going back to Python. Factors of
// products are float, or bfloat16, the upper half of a float, of which two neighbours are multiplied at once; sums and all else
// are float. Each thread plays games of its own, and each game is computed in the same order however many there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int WIDTH = 8, ROWS = 4;
#else
constexpr int WIDTH = 4, ROWS = 4;
#endif
constexpr int PANEL = 2 * WIDTH;  // outputs of a linear layer that are computed together
constexpr int MOST_ROWS = 32;     // positions that go through the layers together

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));

// Two neighbouring terms of a sum in bfloat16, the first one in the lower half
struct Pair {
    uint32_t bits;
};

// All of one layer; weights in panels of (in, PANEL), or (in / 2, PANEL) pairs; biases padded to whole panels
struct Linear {
    const void* weight;
    const float* bias;
    int32_t in, out;
};

struct Norm {
    const float *weight, *bias;
};

struct Block {
    Norm norm_1, norm_2;
    Linear qkv, proj, hidden, output;
    const float* attention_bias;  // (heads, max_length, max_length), or null
};

struct Model {
    int32_t dim, n_heads, n_blocks, max_length, in_pairs;
    float epsilon;
    const Block* blocks;
    Norm norm_out;
    Linear head_hidden, head_output;
    const float *tokens, *positions;  // (codebook_size, dim) and (max_length, dim)
};

namespace {

inline Vector read(const float* from) {
    Vector x;
    std::memcpy(&x, from, sizeof(Vector));
    return x;
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof(Vector)); }

inline Vector broadcast(float x) { return x - Vector{}; }

inline float sum(Vector x) {
    float parts[WIDTH];
    store(parts, x);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float largest(Vector x) {
    float parts[WIDTH];
    store(parts, x);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] = std::max(parts[i], parts[i + half]);
    return parts[0];
}

// By the factors of falling powers of x
template <int N>
inline Vector polynomial(Vector x, const float (&factors)[N]) {
    Vector y = broadcast(factors[0]);
    for (int i = 1; i < N; i++) y = y * x + factors[i];
    return y;
}

// To two units in the last place; below -87 the smallest normal number instead of smaller ones
inline Vector exp(Vector x) {
    x = larger(x, broadcast(-87.0f));
    const Vector rounder = broadcast(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const Vector n = (x * 1.44269504f + rounder) - rounder;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    constexpr float factors[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    const Vector y = polynomial(r, factors) * r * r + r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return y * (Vector)power;
}

// x * Phi(x). The error function is z P(z^2) / Q(z^2), fitted from -4 to 4 to 2e-8, beyond which it is 1 for a float
inline Vector gelu(Vector x) {
    Vector z = larger(x * 0.70710678f, broadcast(-4.0f));
    z = -larger(-z, broadcast(-4.0f));
    constexpr float p[] = {1.97491158e-6f, 2.88027572e-4f, 4.0030838e-3f, 5.34657389e-2f, 1.9623597e-1f, 1.12837899f};
    constexpr float q[] = {3.74809897e-5f, 1.21622137e-3f, 1.5443298e-2f, 1.1647103e-1f, 5.07240772e-1f, 1.0f};
    return 0.5f * x * (1.0f + z * polynomial(z * z, p) / polynomial(z * z, q));
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The bits of the nearest bfloat16, ties to even
inline uint32_t rounded(float x) {
    const uint32_t bits = bits_of(x);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// How terms of sums are kept: T, of which each holds TERMS<T> numbers
template <typename T>
constexpr int TERMS = std::is_same<T, Pair>::value ? 2 : 1;

// Add the products of one T, for all lanes, and the T of each lane
inline Vector add_products(Vector sums, float factor, const float* lanes) { return sums + factor * read(lanes); }

inline Vector add_products(Vector sums, Pair factor, const Pair* lanes) {
    Bits pairs;
    std::memcpy(&pairs, lanes, sizeof(Bits));
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(factor.bits));
#else
    sums += float_of(factor.bits << 16) * (Vector)(pairs << 16);
    return sums + float_of(factor.bits & 0xffff0000) * (Vector)(pairs & 0xffff0000);
#endif
}

// n numbers as T; floats stay where they are
inline const float* terms(const float* x, int64_t, std::vector<float>&) { return x; }

inline const Pair* terms(const float* x, int64_t n, std::vector<Pair>& room) {
    room.resize((n + 1) / 2);
    for (int64_t i = 0; i < n / 2; i++) room[i].bits = rounded(x[2 * i]) | rounded(x[2 * i + 1]) << 16;
    if (n % 2 == 1) room[n / 2].bits = rounded(x[n - 1]);
    return room.data();
}

enum Ending { NOTHING, GELU, RELU, RESIDUAL };  // what is done to the products, RESIDUAL: added to what is there

template <typename T, Ending ENDING, int N_ROWS>
inline void panel(const T* x, const Linear& linear, int first, float* y) {
    const int n_terms = linear.in / TERMS<T>;
    const T* weight = static_cast<const T*>(linear.weight) + static_cast<int64_t>(first) * n_terms;
    Vector sums[N_ROWS][2];
    for (int r = 0; r < N_ROWS; r++)
        for (int c = 0; c < 2; c++) sums[r][c] = read(linear.bias + first + c * WIDTH);
    for (int i = 0; i < n_terms; i++)
        for (int r = 0; r < N_ROWS; r++)
            for (int c = 0; c < 2; c++)
                sums[r][c] = add_products(sums[r][c], x[static_cast<int64_t>(r) * n_terms + i], weight + i * PANEL + c * WIDTH);
    const int n = std::min(PANEL, linear.out - first);
    for (int r = 0; r < N_ROWS; r++) {
        float* out = y + static_cast<int64_t>(r) * linear.out + first;
        float part[PANEL];
        for (int c = 0; c < 2; c++) {
            Vector v = sums[r][c];
            if (ENDING == GELU) v = gelu(v);
            if (ENDING == RELU) v = larger(v, Vector{});
            store(part + c * WIDTH, v);
        }
        for (int i = 0; i < n; i++) out[i] = ENDING == RESIDUAL ? out[i] + part[i] : part[i];
    }
}

template <typename T, Ending ENDING>
void apply(const Linear& linear, const float* inputs, int n_rows, float* y, std::vector<T>& room) {
    const T* x = terms(inputs, static_cast<int64_t>(n_rows) * linear.in, room);
    for (int first = 0; first < linear.out; first += PANEL) {
        const T* rows = x;
        float* out = y;
        int left = n_rows;
        const auto skip = [&](int n) { rows += n * (linear.in / TERMS<T>), out += n * linear.out, left -= n; };
        for (; left >= ROWS; skip(ROWS)) panel<T, ENDING, ROWS>(rows, linear, first, out);
        for (; left >= 4; skip(4)) panel<T, ENDING, 4>(rows, linear, first, out);
        for (; left >= 2; skip(2)) panel<T, ENDING, 2>(rows, linear, first, out);
        if (left == 1) panel<T, ENDING, 1>(rows, linear, first, out);
    }
}

void normalize(const Norm& norm, float epsilon, const float* x, int n_rows, int dim, float* y) {
    for (int r = 0; r < n_rows; r++, x += dim, y += dim) {
        float mean = 0, variance = 0;
        Vector sums{};
        int i = 0;
        for (; i + WIDTH <= dim; i += WIDTH) sums += read(x + i);
        for (mean = sum(sums); i < dim; i++) mean += x[i];
        mean /= dim;
        sums = Vector{};
        for (i = 0; i + WIDTH <= dim; i += WIDTH) {
            Vector apart = read(x + i) - mean;
            sums += apart * apart;
        }
        for (variance = sum(sums); i < dim; i++) variance += (x[i] - mean) * (x[i] - mean);
        float scale = 1.0f / std::sqrt(variance / dim + epsilon);
        for (i = 0; i < dim; i++) y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
    }
}

inline int divided(int n, int by) { return (n + by - 1) / by; }  // rounded up

inline int padded(int n) { return divided(n, WIDTH) * WIDTH; }

// Of one head of one game: keys in groups of WIDTH, (groups, terms of head_dim, WIDTH), and values, (terms of positions,
// padded head_dim)
template <typename T>
struct Head {
    T *keys, *values;
};

template <typename T>
struct Cache {
    T* memory;  // (games, blocks, heads, what a head takes)
    int n_blocks, n_heads, head_dim, max_length;

    int64_t size_of_keys() const { return static_cast<int64_t>(padded(max_length)) * (head_dim / TERMS<T>); }
    int64_t size_of_head() const {
        return size_of_keys() + static_cast<int64_t>(divided(max_length, TERMS<T>)) * padded(head_dim);
    }
    Head<T> head(int64_t game, int block, int head) const {
        T* start = memory + ((game * n_blocks + block) * n_heads + head) * size_of_head();
        return {start, start + size_of_keys()};
    }
};

inline void set(float* to, float x, float) { *to = x; }
inline void set(Pair* to, float x, float y) { to->bits = rounded(x) | rounded(y) << 16; }

// Set one number of those that a T holds; what is behind it becomes zero
inline void put(float* to, int, float x) { *to = x; }
inline void put(Pair* to, int which, float x) { to->bits = which == 0 ? rounded(x) : to->bits | rounded(x) << 16; }

// Keep a key and a value, (head_dim) each
template <typename T>
void remember(Head<T> head, int position, int head_dim, const float* key, const float* value) {
    const int stride = padded(head_dim), n_terms = head_dim / TERMS<T>;
    T* keys = head.keys + static_cast<int64_t>(position / WIDTH) * n_terms * WIDTH + position % WIDTH;
    for (int i = 0; i < n_terms; i++) set(keys + i * WIDTH, key[i * TERMS<T>], key[i * TERMS<T> + TERMS<T> - 1]);
    T* values = head.values + static_cast<int64_t>(position / TERMS<T>) * stride;
    for (int d = 0; d < stride; d++) put(values + d, position % TERMS<T>, d < head_dim ? value[d] : 0.0f);
}

template <typename T, int N_GROUPS>
inline void score(const T* q, const T* keys, int n_terms, float* scores) {
    Vector sums[N_GROUPS] = {};
    for (int i = 0; i < n_terms; i++)
        for (int g = 0; g < N_GROUPS; g++) sums[g] = add_products(sums[g], q[i], keys + (g * n_terms + i) * WIDTH);
    for (int g = 0; g < N_GROUPS; g++) store(scores + g * WIDTH, sums[g]);
}

template <typename T, int N_VECTORS>
inline void average(const T* weights, const T* values, int n_terms, int stride, Vector* y) {
    constexpr int CHAINS = 4 / N_VECTORS;  // sums that do not wait for each other
    Vector sums[CHAINS][N_VECTORS] = {};
    const auto add = [&](int c, int j) {
        for (int v = 0; v < N_VECTORS; v++)
            sums[c][v] = add_products(sums[c][v], weights[j], values + static_cast<int64_t>(j) * stride + v * WIDTH);
    };
    int j = 0;
    for (; j + CHAINS <= n_terms; j += CHAINS)
        for (int c = 0; c < CHAINS; c++) add(c, j + c);
    for (; j < n_terms; j++) add(0, j);
    for (int v = 0; v < N_VECTORS; v++) {
        y[v] = sums[0][v];
        for (int c = 1; c < CHAINS; c++) y[v] += sums[c][v];
    }
}

// What a query, (head_dim), takes from the first n positions; it is scaled in place. scores: room for n padded to WIDTH
template <typename T>
void attend(
    float* query, Head<T> head, int n, int head_dim, const float* bias, float* scores, float* y, std::vector<T>& room
) {
    const int n_groups = divided(n, WIDTH), stride = padded(head_dim), n_terms = head_dim / TERMS<T>;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    for (int d = 0; d < head_dim; d++) query[d] *= scale;
    const T* q = terms(query, head_dim, room);
    int g = 0;
    for (; g + 4 <= n_groups; g += 4) score<T, 4>(q, head.keys + g * n_terms * WIDTH, n_terms, scores + g * WIDTH);
    for (; g + 2 <= n_groups; g += 2) score<T, 2>(q, head.keys + g * n_terms * WIDTH, n_terms, scores + g * WIDTH);
    if (g < n_groups) score<T, 1>(q, head.keys + g * n_terms * WIDTH, n_terms, scores + g * WIDTH);
    if (bias != nullptr)
        for (int j = 0; j < n; j++) scores[j] += bias[j];
    std::fill(scores + n, scores + n_groups * WIDTH, -INFINITY);
    Vector most = read(scores);
    for (g = 1; g < n_groups; g++) most = larger(read(scores + g * WIDTH), most);
    const float best = largest(most);
    Vector totals{};
    for (g = 0; g < n_groups; g++) {
        Vector weights = exp(read(scores + g * WIDTH) - best);
        totals += weights;
        store(scores + g * WIDTH, weights);
    }
    const float scale_out = 1.0f / sum(totals);
    const T* weights = terms(scores, n, room);
    for (int v = 0; v < stride / WIDTH;) {
        Vector part[4];
        const int left = stride / WIDTH - v, n_vectors = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const T* values = head.values + v * WIDTH;
        if (n_vectors == 4) average<T, 4>(weights, values, divided(n, TERMS<T>), stride, part);
        if (n_vectors == 2) average<T, 2>(weights, values, divided(n, TERMS<T>), stride, part);
        if (n_vectors == 1) average<T, 1>(weights, values, divided(n, TERMS<T>), stride, part);
        for (int p = 0; p < n_vectors; p++, v++) {
            part[p] *= scale_out;
            std::memcpy(y + v * WIDTH, part + p, 4 * std::min(WIDTH, head_dim - v * WIDTH));
        }
    }
}

template <typename T>
struct Scratch {
    std::vector<float> x, normed, wide, attended, scores;
    std::vector<T> room;
};

// New positions of some games through all blocks, in place: scratch.x, (n_games, n_new, dim)
template <typename T>
void pass(const Model& model, const Cache<T>& cache, int64_t first_game, int n_games, int n_new, int past, Scratch<T>& scratch) {
    const int dim = model.dim, head_dim = dim / model.n_heads, n_rows = n_games * n_new;
    scratch.normed.resize(static_cast<size_t>(n_rows) * dim);
    scratch.attended.resize(static_cast<size_t>(n_rows) * dim);
    scratch.wide.resize(static_cast<size_t>(n_rows) * 4 * dim);
    scratch.scores.resize(padded(past + n_new));
    float *x = scratch.x.data(), *normed = scratch.normed.data(), *wide = scratch.wide.data();
    for (int b = 0; b < model.n_blocks; b++) {
        const Block& block = model.blocks[b];
        normalize(block.norm_1, model.epsilon, x, n_rows, dim, normed);
        apply<T, NOTHING>(block.qkv, normed, n_rows, wide, scratch.room);
        // Positions in order: each sees those before it
        for (int r = 0; r < n_rows; r++)
            for (int h = 0; h < model.n_heads; h++) {
                float* query = wide + static_cast<int64_t>(r) * 3 * dim + h * head_dim;
                const int position = past + r % n_new;
                Head<T> head = cache.head(first_game + r / n_new, b, h);
                remember(head, position, head_dim, query + dim, query + 2 * dim);
                const float* bias = block.attention_bias;
                if (bias != nullptr) bias += (static_cast<int64_t>(h) * model.max_length + position) * model.max_length;
                float* y = scratch.attended.data() + static_cast<int64_t>(r) * dim + h * head_dim;
                attend(query, head, position + 1, head_dim, bias, scratch.scores.data(), y, scratch.room);
            }
        apply<T, RESIDUAL>(block.proj, scratch.attended.data(), n_rows, x, scratch.room);
        normalize(block.norm_2, model.epsilon, x, n_rows, dim, normed);
        apply<T, GELU>(block.hidden, normed, n_rows, wide, scratch.room);
        apply<T, RESIDUAL>(block.output, wide, n_rows, x, scratch.room);
    }
}

// A class by one random number in [0, 1), as `sample_categorical` does; temperature 0 takes the most likely one
int64_t sample(float* logits, int n, float temperature, float random) {
    const int whole = n / WIDTH * WIDTH;
    Vector most = broadcast(-INFINITY);
    for (int i = 0; i < whole; i += WIDTH) most = larger(read(logits + i), most);
    float best = largest(most);
    for (int i = whole; i < n; i++) best = std::max(best, logits[i]);
    if (temperature == 0) return std::find(logits, logits + n, best) - logits;
    float total = 0;
    for (int i = 0; i < n; i += WIDTH) {
        float part[WIDTH];
        const int here = std::min(WIDTH, n - i);
        std::fill(part + here, part + WIDTH, -INFINITY);
        std::memcpy(part, logits + i, 4 * here);
        store(part, exp((read(part) - best) / temperature));
        std::memcpy(logits + i, part, 4 * here);
        total += sum(read(part));
    }
    // The same sums again, as far as needed
    const float drawn = total * random;
    float below = 0;
    int i = 0;
    for (; i + WIDTH < n; i += WIDTH) {
        const float with_these = below + sum(read(logits + i));
        if (with_these > drawn) break;
        below = with_these;
    }
    for (; i < n - 1; i++) {
        below += logits[i];
        if (below > drawn) break;
    }
    return i;
}

template <typename Function>
void in_threads(int64_t n_games, int n_threads, Function function) {
    n_threads = static_cast<int>(std::max<int64_t>(std::min<int64_t>(n_threads, n_games), 1));
    const auto part = [&](int t) { function(n_games * t / n_threads, n_games * (t + 1) / n_threads); };
#ifdef _OPENMP
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
    for (int t = 0; t < n_threads; t++) part(t);
#else
    std::vector<std::thread> threads;
    for (int t = 1; t < n_threads; t++) threads.emplace_back(part, t);
    part(0);
    for (std::thread& thread : threads) thread.join();
#endif
}

template <typename T>
Cache<T> cache_of(const Model& model, void* memory) {
    return {static_cast<T*>(memory), model.n_blocks, model.n_heads, model.dim / model.n_heads, model.max_length};
}

template <typename T>
void read_positions_as(
    const Model& model, void* memory, int64_t n_games, int n_new, int past, const float* x, float* features, int n_threads
) {
    const Cache<T> cache = cache_of<T>(model, memory);
    const int64_t dim = model.dim, at_once = std::max(MOST_ROWS / n_new, 1);
    in_threads(n_games, n_threads, [&](int64_t begin, int64_t end) {
        Scratch<T> scratch;
        for (int64_t first = begin; first < end; first += at_once) {
            const int n = static_cast<int>(std::min(at_once, end - first));
            scratch.x.assign(x + first * n_new * dim, x + (first + n) * n_new * dim);
            pass(model, cache, first, n, n_new, past, scratch);
            for (int g = 0; g < n; g++) {
                const float* last = scratch.x.data() + ((g + 1) * n_new - 1) * dim;
                normalize(model.norm_out, model.epsilon, last, 1, model.dim, features + (first + g) * dim);
            }
        }
    });
}

template <typename T>
void sample_frame_as(
    const Model& model, void* memory, int64_t n_games, int n_tokens, int past, float temperature, const float* random,
    int64_t* tokens, int n_threads
) {
    const Cache<T> cache = cache_of<T>(model, memory);
    const int dim = model.dim, n_classes = model.head_output.out;
    in_threads(n_games, n_threads, [&](int64_t begin, int64_t end) {
        Scratch<T> scratch;
        std::vector<float> hidden, logits;
        for (int64_t first = begin; first < end; first += MOST_ROWS) {
            const int n = static_cast<int>(std::min<int64_t>(MOST_ROWS, end - first));
            scratch.x.resize(static_cast<size_t>(n) * dim);
            hidden.resize(static_cast<size_t>(n) * dim);
            logits.resize(static_cast<size_t>(n) * n_classes);
            for (int k = 1; k < n_tokens; k++) {
                const float* position = model.positions + static_cast<int64_t>(past + k - 1) * dim;
                for (int g = 0; g < n; g++) {
                    const float* token = model.tokens + tokens[(first + g) * n_tokens + k - 1] * dim;
                    for (int i = 0; i < dim; i++) scratch.x[g * dim + i] = token[i] + position[i];
                }
                pass(model, cache, first, n, 1, past + k - 1, scratch);
                normalize(model.norm_out, model.epsilon, scratch.x.data(), n, dim, scratch.normed.data());
                apply<T, RELU>(model.head_hidden, scratch.normed.data(), n, hidden.data(), scratch.room);
                apply<T, NOTHING>(model.head_output, hidden.data(), n, logits.data(), scratch.room);
                for (int g = 0; g < n; g++) {
                    const float drawn = random == nullptr ? 0.0f : random[(k - 1) * n_games + first + g];
                    tokens[(first + g) * n_tokens + k] = sample(logits.data() + g * n_classes, n_classes, temperature, drawn);
                }
            }
        }
    });
}

}  // namespace

extern "C" {

int32_t panel_width() { return PANEL; }

// Numbers of four bytes that keys and values of one game take
int64_t cache_size(const Model* model) {
    const int64_t of_head = model->in_pairs ? cache_of<Pair>(*model, nullptr).size_of_head()
                                            : cache_of<float>(*model, nullptr).size_of_head();
    return of_head * model->n_heads * model->n_blocks;
}

// Pass embedded positions x, (n_games, n_new, dim), that follow `past` ones; features of the last ones, (n_games, dim)
void read_positions(
    const Model* model, void* cache, int64_t n_games, int32_t n_new, int32_t past, const float* x, float* features,
    int32_t n_threads
) {
    (model->in_pairs ? read_positions_as<Pair> : read_positions_as<float>)(
        *model, cache, n_games, n_new, past, x, features, n_threads
    );
}

// Sample all but the first of tokens, (n_games, n_tokens), by random numbers (n_tokens - 1, n_games), reading all but the last
void sample_frame(
    const Model* model, void* cache, int64_t n_games, int32_t n_tokens, int32_t past, float temperature, const float* random,
    int64_t* tokens, int32_t n_threads
) {
    (model->in_pairs ? sample_frame_as<Pair> : sample_frame_as<float>)(
        *model, cache, n_games, n_tokens, past, temperature, random, tokens, n_threads
    );
}
}
