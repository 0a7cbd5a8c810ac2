// Group processing element of LANES terms a cycle, in offset form: feed-forward, no accumulator.
//
// Each lane picks one resident activation by a one-hot select, complements it if the term is
// subtracted, and shifts it up by the exponent; a carry-save tree adds all lanes and the partial sum
// from above, and a chain of full adders ends it. A group of more terms than lanes takes several
// passes, each with a partial sum of its own, which meet below the array.
//
// Activations are unsigned here: those of a ReLU as they are, signed ones plus 2^(WIDTH-1). For the
// complement, -x = (2^WIDTH - 1 - x) - (2^WIDTH - 1). So operands have no sign to extend and no +1
// to carry in, and a change of sign moves WIDTH bits. What is added too much, 2^WIDTH - 1 times each
// subtracted power of two and 2^(WIDTH-1) times each weight of signed activations, depends on the
// weights alone: it is taken off with the filter's bias, before the sums enter the array.
module gpe_lanes #(
    parameter GROUP = 8,
    parameter LANES = 4,
    parameter WIDTH = 8,
    parameter PSUM = 32,
    parameter EXPONENT = $clog2(WIDTH)
) (
    input                             clock,
    input                             load,  // takes what the column's bus holds
    input      [GROUP*WIDTH-1:0]      activations_in,
    // The terms from the left, and one cycle later to the right; an empty slot selects nothing
    // and is not negative.
    input      [LANES*GROUP-1:0]      select_in,
    input      [LANES-1:0]            negative_in,
    input      [LANES*EXPONENT-1:0]   exponent_in,
    output reg [LANES*GROUP-1:0]      select,
    output reg [LANES-1:0]            negative,
    output reg [LANES*EXPONENT-1:0]   exponent,
    input      [PSUM-1:0]             psum_in,
    output reg [PSUM-1:0]             psum
);
    localparam TERM = 2 * WIDTH - 1;

    reg  [GROUP*WIDTH-1:0] activations;
    wire [(LANES+1)*PSUM-1:0] words;
    wire [PSUM-1:0] sum, carry, total;

    genvar l;
    generate
        for (l = 0; l < LANES; l = l + 1) begin : lane
            integer i;
            reg [WIDTH-1:0] selected;
            always @* begin
                selected = {WIDTH{1'b0}};
                for (i = 0; i < GROUP; i = i + 1)
                    selected = selected | (activations[i*WIDTH +: WIDTH]
                                           & {WIDTH{select_in[l*GROUP + i]}});
            end
            wire [WIDTH-1:0] operand = selected ^ {WIDTH{negative_in[l]}};
            wire [TERM-1:0] shifted =
                {{(TERM-WIDTH){1'b0}}, operand} << exponent_in[l*EXPONENT +: EXPONENT];
            assign words[l*PSUM +: PSUM] = {{(PSUM-TERM){1'b0}}, shifted};
        end
    endgenerate
    assign words[LANES*PSUM +: PSUM] = psum_in;

    carry_save_tree #(.WORDS(LANES + 1), .WIDTH(PSUM)) tree (
        .words(words), .low({(LANES-1){1'b0}}), .sum(sum), .carry(carry)
    );
    ripple_adder #(.WIDTH(PSUM)) adder (.a(sum), .b(carry), .sum(total));

    always @(posedge clock) begin
        if (load) activations <= activations_in;
        psum     <= total;
        select   <= select_in;
        negative <= negative_in;
        exponent <= exponent_in;
    end
endmodule
